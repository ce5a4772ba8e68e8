"""The tests of the test server use its fixtures; a folder of other tests imports those it needs in the same way."""

from tests.tools.hub_server.fixtures import connect, hub, xet_hub

__all__ = ["connect", "hub", "xet_hub"]
