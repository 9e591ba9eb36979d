"""TwoNN against scikit-dimension on manifolds of known dimension and on [CLS] vectors of real text; weight norm."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_sas.core.cli import InputError
from megatron_sas.corpus.build.preprocess import PreprocessSettings, preprocess
from megatron_sas.data.packed import PackedData
from megatron_sas.evaluation.complexity import cls_vectors, intrinsic_dimension, two_nearest, weight_norm
from megatron_sas.evaluation.text import pack_file, packed_text, plain_text
from megatron_sas.run.reading import load_model


def manifold(dimension, ambient, points, seed):
    """A curved `dimension`-dimensional surface of random points in `ambient` dimensions, far from the origin."""
    rng = np.random.default_rng(seed)
    x = rng.random((points, dimension))
    curved = np.concatenate([x, np.sin(x), x**2], axis=1) @ rng.standard_normal((3 * dimension, ambient))
    return torch.from_numpy(1000.0 + curved)


def independent(vectors):
    import skdim  # takes seconds to import

    return skdim.id.TwoNN().fit(vectors.double().numpy()).dimension_


@pytest.mark.parametrize(("dimension", "ambient"), [(1, 3), (2, 30), (5, 64)])
def test_twonn_agrees_with_scikit_dimension_and_with_the_known_dimension(dimension, ambient):
    vectors = manifold(dimension, ambient, 1500, seed=dimension)
    result = intrinsic_dimension(vectors)
    assert result["twonn"] == pytest.approx(independent(vectors), rel=0.02)
    assert result["twonn"] == pytest.approx(dimension, rel=0.1)
    assert abs(result["twonn"] - dimension) < 4 * result["standard_error"] + 0.05 * dimension
    assert result["standard_error"] == pytest.approx(dimension / 1500**0.5, rel=0.5)
    assert (result["num_points"], result["duplicates"], result["discarded"]) == (1500, 0, 150)


def test_neighbours_are_exact():
    vectors = manifold(3, 20, 301, seed=0)
    distances = torch.stack([(vectors - vector).norm(dim=1) for vector in vectors])
    expected = distances.sort(dim=1).values[:, 1:3]
    assert torch.allclose(two_nearest(vectors), expected, rtol=1e-12, atol=0)


def test_duplicates_are_dropped_and_counted_and_order_does_not_matter():
    vectors = manifold(2, 8, 400, seed=0)
    once = intrinsic_dimension(vectors)
    repeated = intrinsic_dimension(torch.cat([vectors, vectors[:50], vectors[:50]])[torch.randperm(500)])
    assert repeated == {**once, "duplicates": 100}


@pytest.mark.parametrize("ambient", [2, 768])
def test_equal_texts_count_once_in_any_dimension_though_their_vectors_differ_in_the_last_digits(ambient):
    """scikit-dimension, which is given each once, is the judge; near duplicates would spoil the estimate."""
    vectors = manifold(2, ambient, 600, seed=1).float() - 1000
    repeated = torch.cat([vectors, vectors[:200] * (1 + 1e-7)])
    texts = np.random.default_rng(0).integers(0, 99, (600, 16))
    result = intrinsic_dimension(repeated, np.concatenate([texts, texts[:200]]))
    assert result == {**intrinsic_dimension(vectors), "duplicates": 200}
    assert result["twonn"] == pytest.approx(independent(vectors), rel=0.02)
    assert abs(intrinsic_dimension(repeated)["twonn"] / result["twonn"] - 1) > 0.2


@pytest.mark.parametrize(
    "vectors",
    [
        torch.zeros(100, 4),
        torch.randn(9, 4),
        torch.randn(0, 4),
        torch.full((100, 4), float("nan")),
        torch.arange(100.0)[:, None],  # both neighbours equally far but at the ends
    ],
)
def test_without_a_dimension_the_result_says_so(vectors):
    result = intrinsic_dimension(vectors)
    assert result["twonn"] is None
    assert result["standard_error"] is None


@pytest.fixture(scope="module")
def real_text(data_dir, tmp_path_factory):
    """Sentences of EWT as a text file."""
    lines = (data_dir / "ud_ewt" / "en_ewt-ud-dev.conllu").read_text().splitlines()
    path = tmp_path_factory.mktemp("text") / "ewt.txt"
    path.write_text("\n\n".join(line.removeprefix("# text = ") for line in lines if line.startswith("# text = ")))
    return path


def test_real_cls_vectors_packed_or_not_and_scikit_dimension_agree(real_text, data_dir, model_directory, tmp_path):
    model, tokenizer = load_model(model_directory)
    rows = pack_file(str(real_text), tokenizer, seq_length=32, num_sequences=400)
    assert rows.shape == (400, 32)
    vectors = cls_vectors(model, plain_text(rows, batch_tokens=1000), 400)
    with torch.no_grad():
        assert torch.allclose(vectors[7], model(torch.from_numpy(rows[7:8])).hidden[0, 0], atol=1e-5)
    result = intrinsic_dimension(vectors)
    assert result["num_points"] + result["duplicates"] == 400
    assert result["twonn"] == pytest.approx(independent(torch.unique(vectors, dim=0)), rel=0.02)

    settings = PreprocessSettings(
        inputs=[str(real_text)],
        tokenizer=str(data_dir / "bert_vocab" / "vocab.txt"),
        parser="none",
        seq_length=32,
        output=str(tmp_path / "packed"),
    )
    preprocess(settings)
    packed = PackedData(tmp_path / "packed")
    assert np.array_equal(packed.tokens[:400], rows)
    batches = packed_text(packed, num_sequences=400, batch_tokens=1000)
    assert torch.equal(cls_vectors(model, batches, 400), vectors)


def test_too_little_text_is_one_line(tmp_path, model_directory):
    _, tokenizer = load_model(model_directory)
    (tmp_path / "short.txt").write_text("A dog barks.\n")
    with pytest.raises(InputError, match=r"short.txt: too little text for one sequence of 32 tokens"):
        pack_file(str(tmp_path / "short.txt"), tokenizer, seq_length=32, num_sequences=5)


def test_weight_norm_counts_every_weight_once(hf_model, model_directory):
    model, _ = load_model(model_directory)
    expected = sum(float(p.detach().double().square().sum()) for p in hf_model.parameters()) ** 0.5
    assert weight_norm(model) == pytest.approx(expected, rel=1e-12)
