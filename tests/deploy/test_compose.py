"""deploy/compose.yaml: valid by Compose's own schema, and true to the server and to the files beside it."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tolserve.settings import ENV_PREFIX, ServeSettings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
FILES = ("compose.yaml", "compose.gpu.yaml")
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]


@pytest.mark.parametrize("name", FILES)
def test_it_follows_composes_schema(name: str) -> None:
    argv = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(DEPLOY / name)]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", FILES)
def test_every_variable_is_an_option_of_the_server(name: str) -> None:
    server = yaml.safe_load((DEPLOY / name).read_text())["services"]["server"]
    ours = {key for key in server["environment"] if key.startswith(ENV_PREFIX)}
    assert ours
    assert ours <= {ENV_PREFIX + field.upper() for field in ServeSettings.model_fields}


def test_every_build_argument_is_one_of_the_dockerfile() -> None:
    declared = set(re.findall(r"^ARG (\w+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    for name in FILES:
        build = yaml.safe_load((DEPLOY / name).read_text())["services"]["server"]["build"]
        assert build["args"].keys() <= declared


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_confined(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["tmpfs"] == ["/tmp"]
    assert service["mem_limit"]
    assert service["healthcheck"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    image = service["image"]
    assert re.search(r":v?\d+\.\d+\.\d+$", image) or "build" in service, f"{image} is not pinned"


def source_of(volume: str | dict[str, Any]) -> tuple[str, bool]:
    """What is mounted, and whether it is a file or folder of the host."""
    if isinstance(volume, dict):
        return volume["source"], volume["type"] == "bind"
    source = volume.split(":")[0]
    return source, source.startswith(".")


def test_what_services_refer_to_exists() -> None:
    secrets = {name for service in SERVICES.values() for name in service.get("secrets", [])}
    assert secrets == COMPOSE["secrets"].keys()
    sources = [source_of(volume) for service in SERVICES.values() for volume in service["volumes"]]
    assert {source for source, on_host in sources if not on_host} == COMPOSE["volumes"].keys()
    for source, on_host in sources:
        if on_host and not source.startswith("${"):
            assert (DEPLOY / source).exists(), source
    for service in SERVICES.values():
        assert set(service.get("depends_on", [])) <= SERVICES.keys()


def test_secrets_are_files_that_git_does_not_keep() -> None:
    ignored = (ROOT / ".gitignore").read_text().split()
    for secret in COMPOSE["secrets"].values():
        assert f"deploy/{Path(secret['file']).parent}/" in ignored
    text = (DEPLOY / "compose.yaml").read_text()
    for name in re.findall(r"/run/secrets/(\w+)", text + (DEPLOY / "prometheus" / "prometheus.yml").read_text()):
        assert name in COMPOSE["secrets"]


def test_the_server_may_finish_before_it_is_killed() -> None:
    grace = re.fullmatch(r"(\d+)s", SERVICES["server"]["stop_grace_period"])
    assert grace is not None
    assert int(grace[1]) > ServeSettings().shutdown_timeout + 5


def test_prometheus_scrapes_the_service_with_its_key() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    (scrape,) = config["scrape_configs"]
    (target,) = scrape["static_configs"][0]["targets"]
    host, _, port = target.partition(":")
    assert host in SERVICES
    assert SERVICES[host]["ports"][0].endswith(f":{port}")
    assert scrape["authorization"]["credentials_file"] == SERVICES[host]["environment"]["TOLSERVE_API_KEY_FILE"]


def test_grafana_finds_its_data_source_and_dashboards() -> None:
    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    host, _, port = source["url"].removeprefix("http://").partition(":")
    assert SERVICES[host]["ports"][0].endswith(f":{port}")
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "tolserve.yml").read_text())["providers"]
    mounted = [volume.split(":")[1] for volume in SERVICES["grafana"]["volumes"]]
    assert provider["options"]["path"] in mounted
