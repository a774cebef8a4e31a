"""Models of transformers over ranks: logits, loss and gradients of the untouched model on one."""

from contextlib import nullcontext
from importlib import import_module
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers", reason="needs the extra: pip install -e '.[huggingface]'")

from longctx.adapters.huggingface import parallelize
from longctx.parallel.layout import Layout
from longctx.parallel.mesh import Mesh
from tests.compare.peers import in_float64

pytestmark = pytest.mark.usefixtures("plain_torch")

COMMON = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
    "max_position_embeddings": 128,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
HYBRID = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
MODELS = {
    "llama": COMMON,
    "mistral": COMMON | {"sliding_window": 7},
    "qwen2": COMMON,
    "qwen3": COMMON,
    "mixtral": COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": COMMON | EXPERTS,
    "minimax": COMMON | HYBRID | {"num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 8},
    "qwen3_next": COMMON
    | EXPERTS
    | HYBRID
    | {
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 6,
        "linear_value_head_dim": 5,
        "shared_expert_intermediate_size": 16,
        "partial_rotary_factor": 0.5,
    },
    "mamba2": {
        "vocab_size": 40,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_heads": 8,
        "head_dim": 8,
        "state_size": 6,
        "n_groups": 2,
        "expand": 2,
        "chunk_size": 8,
    },
}
LENGTH = 43


PACKED = (0, 5, 30, 43)


def model_of(kind):
    # By name: fla, where it is installed, puts models of its own into the Auto classes.
    modeling = import_module(f"transformers.models.{kind}.modeling_{kind}")
    named = {name.lower(): value for name, value in vars(modeling).items()}
    name = kind.replace("_", "")
    torch.manual_seed(3)
    config = named[f"{name}config"](**MODELS[kind], attn_implementation="eager")
    model = named[f"{name}forcausallm"](config)
    model.config._experts_implementation = "eager"  # grouped products are for float32 and narrower
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
            elif "bias" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.train()


def batch(rows=2):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 40, (rows, LENGTH), generator=generator)
    labels = x.clone()
    labels[:, 10:14] = -100
    return x, labels


def documents(x, labels, bounds):
    """Packed: labels of each document's first token are nobody's to say; positions begin anew."""
    positions = torch.cat([torch.arange(end - begin) for begin, end in pairwise(bounds)])
    labels = labels.clone()
    labels[:, list(bounds[:-1])] = -100
    return labels, positions[None].expand_as(x)


def untouched(kind, packed, wide=True):
    """Logits, loss and gradients of the model of transformers, each document by itself; in float64 where `wide`."""
    with in_float64() if wide else nullcontext():
        return _untouched(kind, packed)


def _untouched(kind, packed):
    model, (x, labels) = model_of(kind), batch()
    bounds = PACKED if packed else (0, LENGTH)
    labels, _ = documents(x, labels, bounds)
    parts = [model(input_ids=x[:, b:e], use_cache=False).logits for b, e in pairwise(bounds)]
    logits = torch.cat(parts, dim=1)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    return logits.detach(), loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def over_ranks(kind, packed, options, recompute):
    # What is computed again is computed outside of modes.
    with nullcontext() if recompute else in_float64():
        return _over_ranks(kind, packed, options, recompute)


def _over_ranks(kind, packed, options, recompute):
    mesh = Mesh.build("cpu", cp=dist.get_world_size())
    model = parallelize(model_of(kind), mesh, loss_tile=9, **options)
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    x, labels = batch()
    labels, positions = documents(x, labels, PACKED if packed else (0, LENGTH))
    given = {"position_ids": positions} if packed else {}
    with torch.no_grad():
        logits = model(input_ids=x, **given).logits
    out = model(input_ids=x, labels=labels, **given)
    out.loss.backward()
    return logits, out.loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def check(ranks, kind, packed, size, recompute=False, **options):
    want, loss, gradients = untouched(kind, packed, wide=not recompute)
    bound = 3e-5 if recompute else 1e-9
    answers = ranks.run(over_ranks, kind, packed, options, recompute, size=size)
    layout = Layout(PACKED if packed else (0, LENGTH), options.get("order", "zigzag"), size)
    logits = layout.unshard([answer[0] for answer in answers])
    assert (logits - want).norm() <= bound * want.norm()
    for _, each, _ in answers:
        assert each == pytest.approx(loss, rel=bound)
    assert set(answers[0][2]) == set(gradients)
    scale = 1 if options.get("gradients") == "sum" else size
    for name, ref in gradients.items():
        got = sum(answer[2][name] for answer in answers) / scale
        assert (got - ref).norm() <= bound * ref.norm(), name


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_model_over_ranks_is_the_untouched_one(ranks, kind, packed, size):
    check(ranks, kind, packed, size)


@pytest.mark.parametrize("kind", ["qwen3_next", "llama"])
def test_layers_are_computed_again_with_their_own_batch(ranks, kind):
    check(ranks, kind, True, 2, recompute=True)


@pytest.mark.parametrize(
    "options", [{"order": "balanced", "attention": "ring"}, {"gradients": "sum"}, {"states": "ring"}]
)
def test_other_layouts_and_schedules(ranks, options):
    check(ranks, "minimax", True, 2, **options)


SHARDS = {
    "layers": lambda model: [*model.model.layers],
    "the head by itself": lambda model: [model.lm_head, *model.model.layers],
    "embedding and head together": lambda model: [[model.model.embed_tokens, model.lm_head], *model.model.layers],
}


def sharded(kind, shards, dp):
    """Under FSDP2, whose default is the mean of gradients over ranks; each data-parallel rank has a row of its own."""
    with in_float64():
        return _sharded(kind, shards, dp)


def _sharded(kind, shards, dp):
    from torch.distributed.fsdp import fully_shard

    mesh = Mesh.build("cpu", dp_shard=dp, cp=dist.get_world_size() // dp)
    model = parallelize(model_of(kind), mesh)
    for layer in (*SHARDS[shards](model), model):
        fully_shard(layer, mesh=mesh.shard)
    x, labels = batch()
    labels, positions = documents(x, labels, PACKED)
    mine = slice(None) if dp == 1 else slice(mesh.dp.rank, mesh.dp.rank + 1)
    out = model(input_ids=x[mine], labels=labels[mine], position_ids=positions[mine])
    out.loss.backward()
    return out.loss.item(), {n: p.grad.full_tensor() for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("kind", "shards", "dp"),
    [
        ("qwen3_next", "layers", 1),
        ("llama", "the head by itself", 1),
        ("minimax", "embedding and head together", 1),
        ("llama", "the head by itself", 2),
    ],
)
def test_under_fsdp2(ranks, kind, shards, dp):
    _, loss, gradients = untouched(kind, True)
    answers = ranks.run(sharded, kind, shards, dp, size=2 * dp)
    # Rows have equally many labels: the mean over ranks is that over labels.
    assert sum(got for got, _ in answers) / len(answers) == pytest.approx(loss, rel=1e-9)
    for _, grads in answers:
        for name, ref in gradients.items():
            assert (grads[name] - ref).norm() <= 1e-9 * ref.norm(), name


def test_what_cannot_be_exact_is_refused():
    from transformers import AutoConfig, AutoModelForCausalLM

    rwkv = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("rwkv", vocab_size=40, hidden_size=16, num_hidden_layers=2, attention_hidden_size=16)
    )
    with pytest.raises(ValueError, match="parallelize: model_type 'rwkv' is not supported; supported are llama, "):
        parallelize(rwkv, Mesh("cpu", dp=None, cp=None))
    routed = model_of("mixtral")
    routed.config.output_router_logits = True
    with pytest.raises(
        ValueError, match="'mixtral': output_router_logits: the auxiliary loss would cover only one rank"
    ):
        parallelize(routed, one_rank())
    for key, value in (("is_causal", False), ("rope_parameters", {"rope_type": "dynamic", "factor": 2.0})):
        other = model_of("llama")
        setattr(other.config, key, value)
        with pytest.raises(ValueError, match=f"'llama': {key}: "):
            parallelize(other, one_rank())
    noisy = model_of("mixtral")
    noisy.config.router_jitter_noise = 0.1
    with pytest.raises(ValueError, match="router_jitter_noise: every rank would draw different noise"):
        parallelize(noisy, one_rank())
    model = parallelize(model_of("llama"), one_rank())
    x, _ = batch()
    with pytest.raises(ValueError, match="inputs_embeds: not supported over ranks"):
        model(input_ids=x, inputs_embeds=torch.zeros(2, LENGTH, 32))
    with pytest.raises(
        ValueError, match=r"attention_mask has shape \[2, 1, 43, 43\]: expected a padding mask, \[2, 43\]"
    ):
        model(input_ids=x, attention_mask=torch.ones(2, 1, LENGTH, LENGTH).tril())
    assert model(input_ids=x, return_dict=True).logits.shape == (2, LENGTH, 40)
    with pytest.raises(ValueError, match="output_hidden_states: not supported over ranks"):
        model(input_ids=x, output_hidden_states=True)
    with pytest.raises(ValueError, match="padding has to be at the end"):
        model(input_ids=x, attention_mask=torch.arange(LENGTH)[None].expand(2, -1) > 3)
    with pytest.raises(ValueError, match="packed differently"):
        model(input_ids=x, position_ids=torch.stack([torch.arange(LENGTH), torch.zeros(LENGTH, dtype=torch.int64)]))
    with pytest.raises(ValueError, match="LlamaAttention: there is no layout; call the model that parallelize"):
        model.model(input_ids=x)


def one_rank():
    from longctx.parallel.mesh import Axis

    return Mesh("cpu", dp=Axis(), cp=Axis())
