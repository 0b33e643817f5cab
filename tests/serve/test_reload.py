"""What would replace the weights of a running server is refused, where they are ours."""

from types import SimpleNamespace

import pytest

from ria_vllm.errors import RiaError
from ria_vllm.serve.reload import refuse_other_weights

OURS, OTHER = SimpleNamespace(ria_served=True), SimpleNamespace()


@pytest.fixture
def worker():
    """Call with a model and a draft: a worker as vLLM has them on GPUs."""

    class Worker:
        def reload_weights(self, weights_path=None):
            return f"reloaded {weights_path}"

        def start_weight_update(self): ...

        def start_draft_weight_update(self): ...

        def sleep(self, level=1):
            return f"asleep at {level}"

    for _ in range(2):  # each model that is built asks for it
        refuse_other_weights(Worker)

    def start(model, draft=None):
        found = Worker()
        found.get_model, found.model_runner = lambda: model, SimpleNamespace(get_draft_model=lambda: draft)
        return found

    return start


@pytest.mark.parametrize(("model", "draft"), [(OURS, None), (OTHER, OURS)])
def test_ours_keep_their_weights(worker, model, draft):
    found = worker(model, draft)
    for name in ("reload_weights", "start_weight_update", "start_draft_weight_update"):
        with pytest.raises(RiaError, match=f"{name}: .*start a server on that folder"):
            getattr(found, name)()
    for arguments, named in (((2,), {}), ((), {"level": 2})):
        with pytest.raises(RiaError, match="sleep level 2 drops all weights"):
            found.sleep(*arguments, **named)
    assert found.sleep() == "asleep at 1"


def test_others_are_vllms(worker):
    found = worker(OTHER)
    assert found.reload_weights(weights_path="there") == "reloaded there" and found.sleep(level=2) == "asleep at 2"
