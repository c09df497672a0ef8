"""The local server, as clients see it."""

import pytest

from openai_suite import OpenAISuite, Served
from serving import running, wait_until
from tidar import TidarModel
from tidar.serve.app import create_app
from tiny import CONTEXT, drafting_folder

REFUSED = {
    "frequency_penalty": 0.5,
    "presence_penalty": 0.5,
    "logit_bias": {"5": 1},
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "response_format": {"type": "json_object"},
    "user": "me",
    "best_of": 2,
    "store": True,
    "no_such_thing": 1,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> TidarModel:
    return TidarModel.from_pretrained(
        drafting_folder(tmp_path_factory.mktemp("drafting")), device="cpu", dtype="float32"
    )


@pytest.fixture(scope="module")
def app(model):
    return create_app(model, name="tiny", rows=6, draft_length=4, outcomes=2, alternatives=3)


@pytest.fixture(scope="module")
def served(app):
    with running(app) as url:
        yield Served(url + "/v1", "tiny", CONTEXT, refused=REFUSED)


class TestLocal(OpenAISuite):
    @pytest.fixture(autouse=True)
    def idle_afterwards(self, served, app):
        """No row hangs, whatever the case did."""
        yield
        loop = app.state.service.loop
        wait_until(lambda: loop.running == loop.queued == 0)
