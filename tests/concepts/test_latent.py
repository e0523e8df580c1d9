from __future__ import annotations

import numpy as np
import pytest

from curate.concepts import concept as files
from curate.concepts.concept import direction
from curate.concepts.latent import decoder_concept
from curate.errors import ConceptError
from tests.saes import random_sae


def test_the_direction_is_the_decoder_row_at_the_layer_of_the_sae(tmp_path):
    sae = random_sae(layer=2)
    made = decoder_concept(sae, 7, 3, {"auc": 0.9})
    assert (made.name, made.layer, made.layers(), made.vectors.shape) == ("random-7", 2, [2], (4, 32))
    row = sae.w_dec[7].numpy()
    np.testing.assert_allclose(direction(made), row / np.linalg.norm(row), rtol=1e-5)
    again = files.load(files.save(made, str(tmp_path / made.name)))
    assert files.digest(again) == files.digest(made)
    assert again.meta["auc"] == 0.9


@pytest.mark.parametrize(
    ("latent", "layers", "said"), [(48, 3, "no latent 48"), (-1, 3, "no latent -1"), (0, 1, "layer 2")]
)
def test_what_is_not_there(latent, layers, said):
    with pytest.raises(ConceptError, match=said):
        decoder_concept(random_sae(layer=2), latent, layers)
