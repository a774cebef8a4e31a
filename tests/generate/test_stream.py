"""The tokens that a model goes on with."""

import pytest
import torch

from longctx.errors import UserError
from longctx.generate import Sampling, generate
from longctx.mixers.deltanet import DeltaNetConfig
from longctx.parallel.layout import Layout
from tests.model.cases import VOCABULARY, decoder, hybrid, tokens

GREEDY = Sampling(temperature=0)


def model():
    """Lightning, DeltaNet with its convolution, softmax; untied, or it would repeat its last token."""
    built = decoder(hybrid(layers="LDS", depth=4, deltanet=DeltaNetConfig(heads=3), tie_embeddings=False))
    with torch.no_grad():
        built.head.weight.mul_(3)
    return built


def prompt(length=9):
    return tokens(length)[0]


def test_greedy_is_the_argmax_of_the_whole_forward_pass_step_by_step():
    built, text = model(), prompt().tolist()
    with torch.no_grad():
        for _ in range(25):
            logits = built(torch.tensor([text]), Layout((0, len(text))))[0, -1]
            text.append(int(logits.argmax()))
    want = text[9:]
    assert len(set(want)) > 3
    assert list(generate(built, prompt(), 25, GREEDY)) == want
    assert list(generate(built, prompt().tolist(), 25, GREEDY)) == want
    assert list(generate(built, prompt().int(), 25, GREEDY)) == want


def test_sampled_tokens_are_drawn_from_the_whole_forward_passs_logits():
    built, text = model(), prompt().tolist()
    sampling, chances = Sampling(0.7, top_p=0.9, seed=5), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _ in range(25):
            logits = built(torch.tensor([text]), Layout((0, len(text))))[0, -1]
            text.append(sampling.draw(logits, float(torch.rand((), generator=chances, dtype=torch.float64))))
    assert list(generate(built, prompt(), 25, sampling)) == text[9:]


def test_the_seed_decides_and_nothing_else_does():
    built = model()
    first = list(generate(built, prompt(), 30, Sampling(seed=1)))
    torch.manual_seed(99)
    torch.rand(3)
    other = generate(built, prompt(), 30, Sampling(seed=2))
    again = [pair[0] for pair in zip(generate(built, prompt(), 30, Sampling(seed=1)), other, strict=True)]
    assert again == first
    assert list(generate(built, prompt(), 30, Sampling(seed=2))) != first
    assert list(generate(built, prompt(), 10, Sampling(seed=1))) == first[:10]


@pytest.mark.parametrize("chunk", [1, 4, 9, 4096])
def test_the_prompt_is_prefilled_in_chunks(chunk, monkeypatch):
    built, sizes = model(), []
    want = list(generate(built, prompt(), 5, GREEDY))
    compute = built.next_logits

    def noted(part, cache):
        sizes.append(part.shape[1])
        return compute(part, cache)

    monkeypatch.setattr(built, "next_logits", noted)
    assert list(generate(built, prompt(), 5, GREEDY, prefill_chunk=chunk)) == want
    assert sizes[-4:] == [1] * 4  # and none behind the last token
    assert sum(sizes[:-4]) == 9
    assert max(sizes) == min(chunk, 9)


def test_a_token_is_given_before_the_next_is_computed(monkeypatch):
    built, calls = model(), []
    compute = built.next_logits
    monkeypatch.setattr(built, "next_logits", lambda *given: calls.append(1) or compute(*given))
    stream = generate(built, prompt(), 5)
    assert len(calls) == 0
    next(stream)
    assert len(calls) == 1


def test_a_stop_token_ends_and_is_not_given():
    built = model()
    whole = list(generate(built, prompt(), 30, Sampling(seed=3)))
    stop = whole[7]
    until = whole.index(stop)
    assert list(generate(built, prompt(), 30, Sampling(seed=3), stop=(stop,))) == whole[:until]
    assert list(generate(built, prompt(), 30, Sampling(seed=3), stop=range(VOCABULARY))) == []


def test_rows_beyond_the_vocabulary_are_never_drawn():
    built = model()
    assert max(generate(built, prompt(), 60, Sampling(5.0))) >= 20
    assert max(generate(built, prompt(), 60, Sampling(5.0), vocabulary=20)) < 20
    (best,) = generate(built, prompt(), 1, GREEDY)
    assert list(generate(built, prompt(), 1, GREEDY, vocabulary=best)) != [best]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tokens": []}, "the prompt has shape \\[0\\]; give one sequence of at least one token"),
        ({"tokens": torch.zeros(1, 3, dtype=torch.int64)}, "the prompt has shape \\[1, 3\\]"),
        ({"tokens": [1.5]}, "the prompt is torch.float32; give integers"),
        ({"tokens": [3, VOCABULARY]}, "ids from 3 to 29, but the embedding has ids 0 to 28"),
        ({"tokens": [-1, 2]}, "ids from -1 to 2"),
        ({"count": 0}, "count: 0; give"),
        ({"prefill_chunk": 0}, "prefill_chunk: 0; give"),
        ({"vocabulary": VOCABULARY + 1}, "vocabulary: 30 tokens, but the model's embedding has 29 rows"),
        ({"vocabulary": 0}, "vocabulary: 0 tokens"),
    ],
)
def test_a_mistake_is_reported_at_once(given, words):
    with pytest.raises(UserError, match=words):
        generate(model(), **({"tokens": [1, 2], "count": 3} | given))
