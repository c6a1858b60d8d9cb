"""The part of vLLM's surface that TRL's VLLMGeneration and VLLMClient use, on a transformers model.

Weights come in by name and shape alone, as to vLLM, and sleeping at level 2 loses them. It is vLLM
on a CPU: the engine in this process packs its linear layers, after which they take no weights.
"""

import types
from typing import NamedTuple

import torch
import transformers

from .model_executor.layers import utils as packing  # vllm.utils is a package

__version__ = "0.27.0"


class RequestOutput:
    pass


class SamplingParams:
    def __init__(self, **given):
        self.__dict__.update(given)


class Logprob(NamedTuple):
    logprob: float
    rank: int


class Engine:
    """A model of its own, sampled one request at a time."""

    def __init__(self, model):
        self.model = transformers.AutoModelForCausalLM.from_pretrained(model).eval()

    @torch.no_grad()
    def load_weights(self, pairs):
        own = dict(self.model.named_parameters())
        for name, weight in pairs:
            assert own[name].shape == weight.shape, f"Attempted to load weight {name}"
            own[name].copy_(weight)

    @torch.no_grad()
    def complete(self, prompt, params):
        ids, log_probs = list(prompt), []
        while len(log_probs) < params.max_tokens:
            logits = self.model(input_ids=torch.tensor([ids])).logits[0, -1]
            log_p = (logits / (params.temperature or 1.0)).log_softmax(-1)
            drawn = log_p.exp().multinomial(1) if params.temperature else log_p.argmax(0, True)
            ids.append(drawn.item())
            log_probs.append(log_p[drawn].item())
            if ids[-1] in params.stop_token_ids:
                break
        return ids[len(prompt) :], log_probs


class LLM:
    made = []

    def __init__(self, model, **given):
        self.engine, self.given, self.calls = Engine(model), given, []
        head = self.engine.model.get_output_embeddings()
        for layer in self.engine.model.modules():
            if isinstance(layer, torch.nn.Linear):
                packing.dispatch_cpu_unquantized_gemm(layer, remove_weight=layer is not head)
        executor = types.SimpleNamespace(driver_worker=types.SimpleNamespace(
            model_runner=types.SimpleNamespace(model=self.engine)
        ))
        self.llm_engine = types.SimpleNamespace(model_executor=executor)
        LLM.made.append(self)

    def generate(self, prompts, sampling_params, use_tqdm):
        self.calls.append(sampling_params)
        out = []
        for prompt in prompts:
            ids, log_probs = self.engine.complete(prompt["prompt_token_ids"], sampling_params)
            out.append(types.SimpleNamespace(**prompt, outputs=[types.SimpleNamespace(
                token_ids=ids,
                logprobs=[{i: Logprob(p, 1)} for i, p in zip(ids, log_probs, strict=True)],
            )]))
        return out

    @torch.no_grad()
    def sleep(self, level):
        self.calls.append("sleep")
        for p in self.engine.model.parameters():
            p.fill_(float("nan"))

    def wake_up(self, tags):
        self.calls.append(tags)

    def reset_prefix_cache(self):
        self.calls.append("reset")
