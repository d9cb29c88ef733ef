"""Real servers for these tests as well."""

from e2e.conftest import model_dir, start_server

__all__ = ["model_dir", "start_server"]
