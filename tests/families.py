"""Tiny random models of the families that the trainer is tested on, and one step done naively."""

import torch
import transformers
from runs import naive_log_probs

from rlsd.demo import tiny_model
from rlsd.policy.models import open_forward
from rlsd.policy.update import Batch
from rlsd_kernels import aggregation_weights

PAD, EOS = 0, 1
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64,
    "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None, "initializer_range": 0.3,
}
EXPERTS = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.1, "output_router_logits": True}


def build(name):
    """A tiny model of a family, ready for the passes of the trainer."""
    model = architecture(name)
    open_forward(model)
    return model


def architecture(name):
    """A tiny model of a family; weights large enough that its logits are far from uniform."""
    torch.manual_seed(0)
    t = transformers
    if name == "qwen3":
        return tiny_model(64, seed=0, hidden=32).eval()
    if name == "qwen2.5":  # biases on q, k, v
        return t.Qwen2ForCausalLM(t.Qwen2Config(**SIZES, tie_word_embeddings=True)).eval()
    if name == "llama3":
        return t.LlamaForCausalLM(t.LlamaConfig(**SIZES, tie_word_embeddings=False)).eval()
    if name == "gemma2":
        return t.Gemma2ForCausalLM(t.Gemma2Config(
            **SIZES, head_dim=8, final_logit_softcapping=5.0, sliding_window=4,
        )).eval()
    if name in ("gemma3", "gemma3-softcap"):
        return t.Gemma3ForCausalLM(t.Gemma3TextConfig(
            **SIZES, head_dim=8, sliding_window=4,
            final_logit_softcapping=5.0 if name == "gemma3-softcap" else None,
        )).eval()
    if name == "granite":
        return t.GraniteForCausalLM(t.GraniteConfig(**SIZES, logits_scaling=4.0)).eval()
    if name == "cohere":
        return t.CohereForCausalLM(t.CohereConfig(**SIZES, logit_scale=0.25)).eval()
    if name == "mixtral":
        return t.MixtralForCausalLM(t.MixtralConfig(
            **SIZES, **EXPERTS, num_local_experts=4, head_dim=8,
        )).eval()
    if name == "qwen3-moe":
        return t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(
            **SIZES, **EXPERTS, num_experts=8, moe_intermediate_size=16, head_dim=8,
        )).eval()
    if name == "phi":  # a head with a bias
        made = t.PhiForCausalLM(t.PhiConfig(**SIZES)).eval()
        torch.nn.init.normal_(made.lm_head.bias)
        return made
    return t.GPT2LMHeadModel(t.GPT2Config(  # learned positions
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3,
        bos_token_id=None, eos_token_id=EOS,
    )).eval()


# The families that the table of differences shows, and those with another head or positions.
SHOWN = ("qwen3", "qwen2.5", "llama3", "gemma3", "gemma3-softcap", "granite", "mixtral",
         "qwen3-moe")
FAMILIES = (*SHOWN, "gemma2", "cohere", "phi", "gpt2")
EXPERT_FAMILIES = ("mixtral", "qwen3-moe")


def sequences(lengths, seed=0):
    """Token lists without special ids."""
    rng = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 43, (n,), generator=rng).tolist() for n in lengths]


def right_pad(lists):
    width = max(map(len, lists))
    ids = torch.tensor([x + [PAD] * (width - len(x)) for x in lists])
    return ids, torch.tensor([[1] * len(x) + [0] * (width - len(x)) for x in lists]).bool()


def make_batch():
    """Six live sequences of many lengths, one-token prompts and completions among them."""
    prompts, hints = sequences([3, 9, 1, 4, 2, 6]), sequences([3, 1, 4, 2, 5, 3], seed=3)
    ids, mask = right_pad([c + [EOS] for c in sequences([4, 0, 9, 2, 1, 5], seed=1)])
    return Batch(
        prompts=prompts, teacher_prompts=[h + p for h, p in zip(hints, prompts, strict=True)],
        images=[None] * 6, completion_ids=ids, mask=mask,
        advantages=torch.tensor([1.2, -0.7, 0.4, -1.5, 0.9, -0.3]),
        loss_weights=aggregation_weights(mask),
    )


class Plain:
    """The one option that naive_log_probs reads."""

    temperature = 1.0


def naive_loss(student, teacher, batch, lam, eps_w=0.2):
    """Section 1 of the method on policy, a sequence at a time with the model's own logits."""
    loss = 0.0
    for i, prompt in enumerate(batch.prompts):
        y = batch.completion_ids[i][batch.mask[i]].tolist()
        lp = naive_log_probs(student, prompt, y, Plain)
        with torch.no_grad(), teacher.scoring() as scorer:
            hinted = naive_log_probs(scorer, batch.teacher_prompts[i], y, Plain)
        a = batch.advantages[i]
        w = torch.exp(a.sign() * (hinted - lp.detach())).clamp(1 - eps_w, 1 + eps_w)
        ratio = torch.exp(lp - lp.detach())
        loss = loss - (batch.loss_weights[i][batch.mask[i]] * ratio * a * (1 - lam + lam * w)).sum()
    return loss


def gradients(model):
    return {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}
