"""What a layer says of the tensors that it was not given."""

import pytest
from gated_model import PREFIX, Model, attached, finished, stored_model, tensors

from ria_vllm.errors import RiaError


def test_a_missing_output_is_named(ranks):
    """Even if the files do not have it, so that no linear of that name is expected."""
    stored = stored_model()
    del stored.tensors[f"{PREFIX}.up"]
    config = stored.config()
    model = attached(config, Model(config))
    model.load_weights(tensors(stored))
    with pytest.raises(RiaError, match=r"model\.layers\.0\.gate\.compressed is in none of the weight files"):
        finished(model)
