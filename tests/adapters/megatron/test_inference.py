"""Megatron's static inference: a prompt at once, then token by token, as the whole sequence gives."""

import pytest
import torch

pytest.importorskip("megatron.core", reason="needs the extra: pip install -e '.[megatron]'")

from longctx.adapters.megatron.specs import layer_spec
from longctx.mixers.head_mixture import HeadMixtureConfig
from tests.adapters.megatron.cases import LENGTH, Run, gpt, parallel, tokens
from tests.adapters.megatron.shim import on_cpu

PROMPT = 20


def generated(spec, run, window):
    """The logits of the last tokens, all at once and from the layers' caches."""
    from megatron.core import parallel_state
    from megatron.core.inference.contexts import StaticInferenceContext

    with on_cpu(), torch.no_grad():
        parallel(run)
        model = gpt(run, spec, window_size=window).eval()
        x, _ = tokens(2)
        places = torch.arange(LENGTH)[None].expand(2, -1)
        want = model(x, places, None)
        context, found = StaticInferenceContext(2, LENGTH), []
        for part in (slice(0, PROMPT), *(slice(t, t + 1) for t in range(PROMPT, LENGTH))):
            out = model(x[:, part], places[:, part], None, inference_context=context, runtime_gather_output=True)
            context.sequence_len_offset += part.stop - part.start
            found.append(out[:, -1])
        parallel_state.destroy_model_parallel()
        return want[:, PROMPT - 1 :], torch.stack(found, dim=1)


@pytest.mark.parametrize("window", [None, (5, 0)])
@pytest.mark.parametrize("pattern", ["S", "L", "MS", "EK"])
def test_token_by_token_as_all_at_once(ranks, pattern, window):
    for run in (Run(), Run(tp=2)):
        for want, got in ranks.run(generated, layer_spec(pattern), run, window, size=run.tp):
            assert (got - want).norm() <= 1e-10 * want.norm()


def test_a_mixture_of_heads_token_by_token(ranks):
    heads = HeadMixtureConfig(mixers=("softmax", "lightning"), shared=4, active=2)
    for run in (Run(), Run(tp=2)):
        for want, got in ranks.run(generated, layer_spec("LS", heads=heads), run, None, size=run.tp):
            assert (got - want).norm() <= 1e-10 * want.norm()
