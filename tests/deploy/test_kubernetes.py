"""deploy/kubernetes as kustomize renders it: valid, in agreement with itself, and with the server."""

import os
import re
import subprocess
from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Any, cast

import kubernetes_validate
import pytest
import yaml

from tolserve import __version__
from tolserve.api.app import create_app
from tolserve.api.edge import OPEN_PATHS
from tolserve.engine.blocks import BlockPool
from tolserve.engine.child import KILL_SECONDS, STOP_SECONDS
from tolserve.engine.client import LONGEST_PAUSE_SECONDS
from tolserve.engine.metrics import EngineMetrics
from tolserve.engine.scheduler import Scheduler
from tolserve.metrics import Metrics
from tolserve.settings import ENV_PREFIX, ServeSettings

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"
README = (FOLDER / "README.md").read_text()
OVERLAYS = ("cpu", "gpu")
# The oldest Kubernetes whose fields the manifests use: preStop's sleep is on by default from 1.30.
OLDEST = "1.30"

Manifest = dict[str, Any]


def kustomize(kubectl: str, folder: Path) -> dict[str, Manifest]:
    """A folder's objects by kind; there is one of each."""
    text = subprocess.run([kubectl, "kustomize", str(folder)], check=True, capture_output=True, text=True).stdout
    objects = list(yaml.safe_load_all(text))
    by_kind = {thing["kind"]: thing for thing in objects}
    assert len(by_kind) == len(objects)
    return by_kind


@pytest.fixture(scope="module", params=OVERLAYS)
def rendered(request: pytest.FixtureRequest, tool: Callable[[str], str]) -> dict[str, Manifest]:
    return kustomize(tool("kubectl"), FOLDER / "overlays" / request.param)


def pod(rendered: dict[str, Manifest]) -> Manifest:
    return cast(Manifest, rendered["Deployment"]["spec"]["template"])


def container(rendered: dict[str, Manifest]) -> Manifest:
    (only,) = pod(rendered)["spec"]["containers"]
    return cast(Manifest, only)


def settings(rendered: dict[str, Manifest], key_file: Path) -> ServeSettings:
    """What the server makes of the container's environment. Raises for a variable that is no option's."""
    key_file.write_text("key")
    given = {}
    for variable in container(rendered)["env"]:
        value = variable.get("value")
        if value is None:
            kind, _, resource = variable["valueFrom"]["resourceFieldRef"]["resource"].partition(".")
            value = str(ceil(float(container(rendered)["resources"][kind][resource])))
        assert variable["name"].startswith(ENV_PREFIX)
        given[variable["name"].removeprefix(ENV_PREFIX).lower()] = value
    assert given.pop("api_key_file").startswith("/run/secrets/tolserve/")
    return ServeSettings(**given, api_key_file=key_file)


def test_there_is_what_is_needed(rendered: dict[str, Manifest]) -> None:
    assert rendered.keys() == {
        "ServiceAccount",
        "Deployment",
        "Service",
        "PodDisruptionBudget",
        "HorizontalPodAutoscaler",
        "NetworkPolicy",
        "ServiceMonitor",
        "PersistentVolumeClaim",
    }


@pytest.mark.parametrize("version", [OLDEST, kubernetes_validate.latest_version()])
def test_every_object_passes_strict_validation(rendered: dict[str, Manifest], version: str) -> None:
    unknown = []
    for kind, manifest in rendered.items():
        try:
            kubernetes_validate.validate(manifest, version, strict=True)
        except kubernetes_validate.SchemaNotFoundError:
            unknown.append(kind)
    assert unknown == ["ServiceMonitor"]  # not Kubernetes' own; its shape is tested below


def test_the_environment_is_options_with_valid_values(rendered: dict[str, Manifest], tmp_path: Path) -> None:
    options = settings(rendered, tmp_path / "key")
    assert options.host == "0.0.0.0"
    assert options.threads == int(container(rendered)["resources"]["limits"]["cpu"])
    gpus = container(rendered)["resources"]["limits"].get("nvidia.com/gpu")
    assert options.device == ("cuda" if gpus else "cpu")
    # Kubernetes' own variables for a Service named tolserve would look like options.
    assert pod(rendered)["spec"]["enableServiceLinks"] is False


def test_the_key_is_the_one_that_prometheus_sends(rendered: dict[str, Manifest]) -> None:
    volumes = {volume["name"]: volume for volume in pod(rendered)["spec"]["volumes"]}
    mounts = {mount["mountPath"]: mount for mount in container(rendered)["volumeMounts"]}
    (path,) = (v["value"] for v in container(rendered)["env"] if v["name"] == "TOLSERVE_API_KEY_FILE")
    secret = volumes[mounts[str(Path(path).parent)]["name"]]["secret"]
    (endpoint,) = rendered["ServiceMonitor"]["spec"]["endpoints"]
    assert endpoint["authorization"]["credentials"] == {"name": secret["secretName"], "key": Path(path).name}
    # Secret files belong to root and to the pod's group.
    assert secret["defaultMode"] == 0o440
    assert pod(rendered)["spec"]["securityContext"]["fsGroup"] == 10001


def test_probes_ask_what_the_server_answers_without_a_key(rendered: dict[str, Manifest]) -> None:
    routes = create_app(ServeSettings()).openapi()["paths"]
    probes = {name: container(rendered)[name]["httpGet"] for name in ("startupProbe", "readinessProbe")}
    assert {probe["path"] for probe in probes.values()} == {"/ready"}
    live = container(rendered)["livenessProbe"]
    for probe in (*probes.values(), live["httpGet"]):
        assert probe["path"] in OPEN_PATHS & routes.keys()
        assert probe["port"] == "http"
    assert live["httpGet"]["path"] == "/health"
    # A new engine loads the model as the first one did, after a pause of up to 30 s.
    start = container(rendered)["startupProbe"]
    patience = live["periodSeconds"] * live["failureThreshold"]
    assert patience >= start["periodSeconds"] * start["failureThreshold"] + LONGEST_PAUSE_SECONDS


def test_the_grace_period_covers_the_whole_stop(rendered: dict[str, Manifest], tmp_path: Path) -> None:
    before = container(rendered)["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain = settings(rendered, tmp_path / "key").shutdown_timeout
    assert pod(rendered)["spec"]["terminationGracePeriodSeconds"] > before + drain + STOP_SECONDS + KILL_SECONDS


def test_selectors_find_their_objects(rendered: dict[str, Manifest]) -> None:
    spec = pod(rendered)["spec"]
    selectors = [
        rendered["Deployment"]["spec"]["selector"]["matchLabels"],
        rendered["Service"]["spec"]["selector"],
        rendered["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        rendered["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
        *(spread["labelSelector"]["matchLabels"] for spread in spec["topologySpreadConstraints"]),
    ]
    for selector in selectors:
        assert selector
        assert selector.items() <= pod(rendered)["metadata"]["labels"].items()
    monitored = rendered["ServiceMonitor"]["spec"]["selector"]["matchLabels"]
    assert monitored.items() <= rendered["Service"]["metadata"]["labels"].items()
    target = rendered["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", rendered["Deployment"]["metadata"]["name"])
    assert spec["serviceAccountName"] == rendered["ServiceAccount"]["metadata"]["name"]
    claims = [v["persistentVolumeClaim"] for v in spec["volumes"] if "persistentVolumeClaim" in v]
    assert claims == [{"claimName": rendered["PersistentVolumeClaim"]["metadata"]["name"], "readOnly": True}]


def test_ports_are_one_and_the_same(rendered: dict[str, Manifest], tmp_path: Path) -> None:
    (port,) = container(rendered)["ports"]
    assert port == {"name": "http", "containerPort": settings(rendered, tmp_path / "key").port}
    (service,) = rendered["Service"]["spec"]["ports"]
    assert service["targetPort"] == port["name"]
    (endpoint,) = rendered["ServiceMonitor"]["spec"]["endpoints"]
    assert endpoint["port"] == service["name"]
    (rule,) = rendered["NetworkPolicy"]["spec"]["ingress"]
    assert [allowed["port"] for allowed in rule["ports"]] == [port["name"]]


def test_nothing_else_comes_in_and_nothing_goes_out(rendered: dict[str, Manifest]) -> None:
    policy = rendered["NetworkPolicy"]["spec"]
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    assert policy["egress"] == []
    (rule,) = policy["ingress"]
    assert rule["from"]
    assert all(peer["namespaceSelector"]["matchLabels"] for peer in rule["from"])


def test_the_container_may_do_little(rendered: dict[str, Manifest]) -> None:
    spec = pod(rendered)["spec"]
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["runAsUser"] == 10001
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container(rendered)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert spec["automountServiceAccountToken"] is False
    assert rendered["ServiceAccount"]["automountServiceAccountToken"] is False
    writable = [mount["mountPath"] for mount in container(rendered)["volumeMounts"] if not mount.get("readOnly")]
    assert writable == ["/tmp"]
    assert container(rendered)["resources"]["limits"].keys() >= {"cpu", "memory"}


def test_the_autoscaler_reads_metrics_that_the_server_has(rendered: dict[str, Manifest], tmp_path: Path) -> None:
    metrics = Metrics()
    EngineMetrics(metrics).state(Scheduler(BlockPool(1, 1), max_seqs=1, max_tokens=1, max_distinct=None))
    known = {metric.name for metric in metrics.snapshot() if metric.kind == "gauge"}
    spec = rendered["HorizontalPodAutoscaler"]["spec"]
    targets = {m["pods"]["metric"]["name"]: float(m["pods"]["target"]["averageValue"]) for m in spec["metrics"]}
    assert targets.keys() <= known
    # What runs is bounded by the batch, so a target above it would never be reached.
    assert targets["tolserve_num_requests_running"] < settings(rendered, tmp_path / "key").max_num_seqs
    (rule,) = yaml.safe_load((FOLDER / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    (pattern,) = re.findall(r'__name__=~"([^"]*)"', rule["seriesQuery"])
    assert all(re.fullmatch(pattern, name) for name in targets)


def test_a_new_version_takes_a_server_away_first_only_for_its_gpu(rendered: dict[str, Manifest]) -> None:
    strategy = rendered["Deployment"]["spec"]["strategy"]["rollingUpdate"]
    gpu = "nvidia.com/gpu" in container(rendered)["resources"]["limits"]
    assert strategy == ({"maxSurge": 0, "maxUnavailable": 1} if gpu else {"maxSurge": 1, "maxUnavailable": 0})
    assert "replicas" not in rendered["Deployment"]["spec"]  # applying it again must not undo the autoscaler
    assert rendered["HorizontalPodAutoscaler"]["spec"]["minReplicas"] > 1
    assert rendered["PodDisruptionBudget"]["spec"]["maxUnavailable"] == 1


def test_the_image_is_this_version(rendered: dict[str, Manifest]) -> None:
    name, _, tag = container(rendered)["image"].partition(":")
    gpu = "nvidia.com/gpu" in container(rendered)["resources"]["limits"]
    assert (name, tag) == ("tolserve", __version__ + ("-cuda" if gpu else ""))
    tolerated = [toleration["key"] for toleration in pod(rendered)["spec"].get("tolerations", [])]
    assert tolerated == (["nvidia.com/gpu"] if gpu else [])


def test_the_readmes_own_overlay_renders(tool: Callable[[str], str], tmp_path: Path) -> None:
    (example,) = re.findall(r"```yaml\n(# kustomization.yaml.*?)```", README, re.DOTALL)
    example = example.replace("path/to/deploy/kubernetes", os.path.relpath(FOLDER, tmp_path.resolve()))
    (tmp_path / "kustomization.yaml").write_text(example)
    objects = kustomize(tool("kubectl"), tmp_path)
    assert objects["ServiceMonitor"]["metadata"]["labels"]["release"] == "kube-prometheus-stack"
    without = example.replace("# - target", "- target").replace('#   patch: "', '  patch: "')
    (tmp_path / "kustomization.yaml").write_text(without)
    objects = kustomize(tool("kubectl"), tmp_path)
    assert "ServiceMonitor" not in objects
    for manifest in objects.values():
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
        assert manifest["metadata"]["namespace"] == "tolserve"
    assert "kubectl create namespace tolserve" in README
    variables = {v["name"]: v.get("value") for v in container(objects)["env"]}
    assert variables["TOLSERVE_MODEL"] == "/models/my-model"
    assert variables["TOLSERVE_HOST_CACHE"]  # the overlay's own options stay
    assert container(objects)["image"] == f"registry.example.com/tolserve:{__version__}-cuda"


def test_the_readmes_command_makes_one_object_of_all_rules() -> None:
    (command,) = re.findall(r"```\n(\{ printf .*?) \| kubectl apply -f -\n```", README, re.DOTALL)
    done = subprocess.run(["bash", "-c", command], cwd=FOLDER.parents[1], check=True, capture_output=True)
    rule = yaml.safe_load(done.stdout)
    assert rule["kind"] == "PrometheusRule"
    labels = {"release": "kube-prometheus-stack"}
    assert rule["metadata"] == {"name": "tolserve", "namespace": "tolserve", "labels": labels}
    files = sorted((FOLDER.parent / "prometheus" / "rules").glob("*.yml"))
    assert rule["spec"]["groups"] == [group for path in files for group in yaml.safe_load(path.read_text())["groups"]]
