"""Who may change a server, before any engine is asked."""

from pathlib import Path

import pytest

from api.wire import Call, caller, error_of
from tolserve.api.app import create_app
from tolserve.settings import ServeSettings

ROUTES = [("/v1/tol/cache", {"device_cache": "64"}), ("/v1/tol/table/reopen", {})]


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_nobody_changes_a_server_without_a_key(call: Call, path: str, body: dict[str, str]) -> None:
    for headers in ({}, {"authorization": "Bearer anything"}):
        refused = call("POST", path, json=body, headers=headers)
        error = error_of(refused)
        assert (refused.status_code, error["type"], error["code"]) == (403, "permission_error", "no_api_key")
        assert "start it with --api-key" in error["message"]


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_a_key_is_asked_for_however_it_was_given(
    model_dir: Path, tmp_path: Path, path: str, body: dict[str, str]
) -> None:
    (tmp_path / "key").write_text("k3y\n")
    for options in ({"api_key": "k3y"}, {"api_key_file": tmp_path / "key"}):
        call = caller(create_app(ServeSettings(model=model_dir, **options)))
        assert call("POST", path, json=body).status_code == 401
        loading = call("POST", path, json=body, headers={"authorization": "Bearer k3y"})
        assert (loading.status_code, error_of(loading)["code"]) == (503, "not_ready")
