"""Sampling by vLLM: TRL's own VLLMGeneration and VLLMClient, over a fake of vLLM (fake_vllm/)."""

import http.server
import importlib
import json
import sys
import threading
import types
from pathlib import Path

import pytest
import torch
import transformers
from families import EOS, build, sequences
from runs import (
    WORDS,
    assert_same,
    make_trainer,
    naive_log_probs,
    options,
    parameters,
    quick,  # noqa: F401
)

from rlsd import UserError
from rlsd.config import make_config
from rlsd.demo import word_tokenizer
from rlsd.policy.models import STUDENT, TEACHER, adapter_weights, add_lora, add_teacher_adapter
from rlsd.sampling.vllm_sampler import VLLMSampler, _loadable, halved, merged_weights

FAKE = str(Path(__file__).parent / "fake_vllm")
HOSTS = ("vllm", "trl")  # and TRL's own client of the server needs requests


def forget_hosts():
    """Take out of sys.modules what knows whether vLLM is installed; returns it."""
    names = [name for name in sys.modules if name.split(".")[0] in HOSTS]
    return {name: sys.modules.pop(name) for name in names}


@pytest.fixture
def vllm(monkeypatch):
    """The fake vllm module, which TRL takes for an installed one."""
    pytest.importorskip("trl")
    kept = forget_hosts()
    monkeypatch.syspath_prepend(FAKE)
    if importlib.util.find_spec("requests") is None:
        monkeypatch.syspath_prepend(f"{FAKE}/http_client")
    monkeypatch.setenv("RANK", "0")  # TRL sets these; monkeypatch takes them away again
    for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    module = importlib.import_module("vllm")
    yield module
    forget_hosts()
    for name in [n for n in sys.modules if FAKE in str(getattr(sys.modules[n], "__file__", ""))]:
        del sys.modules[name]
    sys.modules.update(kept)


def with_adapters(bf16=False):
    """A model with the student's adapter, far from 0, and another teacher's."""
    model = build("llama3")
    if bf16:
        model = model.bfloat16()
    add_lora(model, make_config({"use_peft": True, "lora_r": 4}))
    add_teacher_adapter(model)
    with torch.no_grad():
        for p in adapter_weights(model, STUDENT).values():
            p.data = torch.randn(p.shape)
        for p in adapter_weights(model, TEACHER).values():
            p.data = torch.full(p.shape, 9.0)
    return model


def test_merged_weights_are_those_of_a_plain_model_that_computes_the_same():
    model, plain = with_adapters(), build("llama3")
    before = parameters(model)
    plain.load_state_dict(dict(merged_weights(model)), strict=True)
    ids = torch.tensor([sequences([9])[0]])
    torch.testing.assert_close(plain(input_ids=ids).logits, model(input_ids=ids).logits)
    assert_same(parameters(model), before)
    names = [name for name, _ in build("llama3").named_parameters()]
    assert [name for name, _ in merged_weights(model)] == names
    assert_same(dict(merged_weights(build("llama3"))), parameters(build("llama3")))


def test_merged_bf16_weights_are_rounded_once():
    model = with_adapters(bf16=True)
    layer = model.model.layers[1].mlp.up_proj
    added = layer.lora_B[STUDENT].weight @ layer.lora_A[STUDENT].weight * layer.scaling[STUDENT]
    want = (layer.base_layer.weight.float() + added).bfloat16()
    got = dict(merged_weights(model))["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(got, want) and not torch.equal(got, layer.base_layer.weight)


def test_a_missing_package_is_named():
    names = ("model", "tokenizer", make_config({"use_vllm": True}), [EOS])
    find = importlib.util.find_spec
    for missing in HOSTS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(importlib.util, "find_spec", lambda name, missing=missing: (
                None if name == missing else find("json")
            ))
            with pytest.raises(UserError, match=f"needs the package {missing}: pip install"):
                VLLMSampler(*names)


def check_run(trainer, engine):
    """A rollout by the engine has today's weights and its own log-probs."""
    rows = [row["prompt_ids"] for row in trainer.rows[:4]]
    got = trainer.sample(trainer.model, trainer.tokenizer, rows, trainer.config)
    for prompt, ids, mask, drawn in zip(rows, *got[:2], got.log_probs, strict=True):
        with torch.no_grad():
            want = naive_log_probs(trainer.model, prompt, ids[mask].tolist(), trainer.config)
        torch.testing.assert_close(drawn[mask], want, rtol=1e-4, atol=1e-4)
    assert got.truncated.tolist() == [
        ids[mask][-1].item() not in trainer.model.generation_config.eos_token_id
        for ids, mask in zip(*got[:2], strict=True)
    ]
    assert_same(parameters(engine.model), {
        name: p.clone() for name, p in merged_weights(trainer.model)
    })


def trials_and_samples(vllm, llm):
    """The calls by which weights are checked, and the others; one check comes before each."""
    calls = [c for c in llm.calls if isinstance(c, vllm.SamplingParams)]
    assert len(calls) % 2 == 0
    return [*calls[:2], *calls[2::2]], calls[3::2]  # two at the start


@pytest.mark.parametrize("changed", [
    {}, {"use_peft": True, "lora_r": 4}, {"vllm_enable_sleep_mode": True},
], ids=["full", "lora", "sleep"])
def test_colocated_vllm_samples_with_the_weights_of_every_step(vllm, tmp_path, changed):
    trainer = make_trainer(
        tmp_path, use_vllm=True, temperature=0.7, rollout_batch_size=7, eval_steps=1,
        vllm_gpu_memory_utilization=0.25, vllm_max_model_length=99, **changed,
    )
    llm, (first, *_, last) = vllm.LLM.made[-1], trainer.train()
    sleeps = changed.get("vllm_enable_sleep_mode", False)
    if not sleeps:  # else the engine has lost its weights again
        check_run(trainer, llm.engine)
    given = {name: llm.given[name] for name in (
        "gpu_memory_utilization", "max_model_len", "max_num_seqs", "logprobs_mode",
        "enable_sleep_mode",
    )}
    assert given == {
        "gpu_memory_utilization": 0.25, "max_model_len": 99, "max_num_seqs": 7,
        "logprobs_mode": "processed_logprobs",
        "enable_sleep_mode": sleeps,
    }
    trials, sampled = trials_and_samples(vllm, llm)
    assert {(c.temperature, c.max_tokens) for c in trials} == {(0.7, 4)}
    # Greedy and sampled before step 1; then each step's rollout and the evaluation after it.
    wanted = [0.0, 0.7, 0.7, 0.0, 0.7, 0.7, 0.0, 0.7]
    assert [c.temperature for c in sampled[:8]] == wanted
    for c in sampled:
        assert (c.max_tokens, c.n, c.logprobs, c.top_k, c.top_p) == (6, 1, 0, 0, 1.0)
        assert set(c.stop_token_ids) == {1, *range(8, 20)}
    if sleeps:
        trial, sample = trials[0], sampled[0]
        awake = [["weights"], "reset", ["kv_cache"]]
        kinds = [trial if c in trials else sample if c in sampled else c for c in llm.calls]
        assert kinds == ["sleep", *2 * [*awake, trial, "sleep"],
                         *len(sampled) * [*awake, trial, sample, "sleep"]]
    assert last["sampling/sampling_logp_difference/max"] < 1e-4
    # TRL's default: the correction is on under vLLM.
    assert last["sampling/importance_sampling_ratio/max"] == pytest.approx(1, abs=1e-4)
    assert last["grad_norm"] > 0 and "eval/pass@1_greedy" in first


def test_vllm_is_told_what_to_keep(vllm, tmp_path):
    filters = {"top_p": 0.9, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1}
    trainer = make_trainer(tmp_path, use_vllm=True, **filters)
    trainer.sample(trainer.model, trainer.tokenizer, [[4, 5]], trainer.config)
    trials, (sample,) = trials_and_samples(vllm, vllm.LLM.made[-1])
    none = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    for calls, kept in ((trials, none), ([sample], filters)):
        assert all({name: getattr(c, name) for name in filters} == kept for c in calls)


def test_halved_weights_come_back_to_the_bit():
    model = with_adapters(bf16=True)
    before = parameters(model)
    with halved(model):
        assert_same(parameters(model), {name: p / 2 for name, p in before.items()})
    assert_same(parameters(model), before)


def test_what_a_gguf_file_held_is_written_for_vllm_to_read(tmp_path):
    """Only where there is no folder: a resumed run has its checkpoint, or the base beside it."""
    model, ids = with_adapters(), torch.tensor([sequences([9])[0]])
    model.name_or_path = own = str(tmp_path / "base")
    with _loadable(model, word_tokenizer(WORDS), "x.gguf"):
        read = transformers.AutoModelForCausalLM.from_pretrained(model.name_or_path)
        torch.testing.assert_close(read(input_ids=ids).logits, model(input_ids=ids).logits)
        assert len(transformers.AutoTokenizer.from_pretrained(model.name_or_path)) > len(WORDS)
    assert model.name_or_path == own
    (tmp_path / "base").mkdir()
    for path in ("x.gguf", "org/model"):
        with _loadable(model, None, path):
            assert model.name_or_path == own


def deaf(part):
    """load_weights of an engine that drops what it is sent for parameters so named."""
    def load_weights(self, pairs):
        own = dict(self.model.named_parameters())
        for name, weight in pairs:
            if part not in name:
                own[name].data.copy_(weight)
    return load_weights


@pytest.mark.parametrize("part", ["", "embed", "mlp", "self_attn"],
                         ids=["all", "embedding", "mlp", "attention"])
def test_an_engine_that_keeps_old_weights_is_refused(vllm, tmp_path, monkeypatch, part):
    make_trainer(tmp_path, use_vllm=True)
    monkeypatch.setattr(vllm.Engine, "load_weights", deaf(part))
    with pytest.raises(UserError, match="vLLM keeps old weights of Qwen3ForCausalLM"):
        make_trainer(tmp_path, use_vllm=True)


def test_a_head_packed_beside_its_embedding_is_refused(vllm, tmp_path, monkeypatch):
    """What reload_weights does on a CPU: a tied head computes with its old copy."""
    from vllm.model_executor.layers import utils

    build_llm = vllm.LLM.__init__

    def packs_the_head(self, model, **given):
        build_llm(self, model, **given)
        head = self.engine.model.get_output_embeddings()
        assert head.weight is self.engine.model.get_input_embeddings().weight
        packing(head, remove_weight=False)

    packing = utils.dispatch_cpu_unquantized_gemm
    monkeypatch.setattr(vllm.LLM, "__init__", packs_the_head)
    with pytest.raises(UserError, match="vLLM keeps old weights of Qwen3ForCausalLM"):
        make_trainer(tmp_path, use_vllm=True)
    assert utils.dispatch_cpu_unquantized_gemm is packing


def test_weights_that_stop_arriving_end_the_run_and_lose_nothing(vllm, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, use_vllm=True, learning_rate=0.1, max_steps=9)
    update, steps = trainer.update, []

    def deaf_from_the_second(batch, step):
        if step == 2:
            monkeypatch.setattr(vllm.Engine, "load_weights", deaf(""))
        steps.append(step)
        return update(batch, step)

    trainer.update = deaf_from_the_second
    with pytest.raises(UserError, match="does not hold today's weights of Qwen3.*safe in"):
        trainer.train()
    assert steps == list(range(1, steps[-1] + 1)) and 2 <= steps[-1] < 9
    assert (tmp_path / "run" / f"checkpoint-{steps[-1]}").is_dir()


def test_errors_of_the_engine_are_sentences(vllm, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, use_vllm=True)
    drawn = trainer.model, trainer.tokenizer, [[4, 5]], trainer.config

    def fails(error):
        def call(*_, **given):
            raise error
        return call

    for owner, name, error, said in (
        (vllm.LLM, "generate", Exception("Request failed: 500,\n down"),
         "vLLM cannot sample: Request failed: 500, down."),
        (vllm.Engine, "load_weights", AttributeError("no attribute 'weight_loader'"),
         "vLLM cannot take the weights: AttributeError: no attribute 'weight_loader'."),
        (vllm.Engine, "load_weights", AssertionError(), "vLLM cannot take the weights: Assertion"),
        (vllm.LLM, "__init__", KeyError("model"), "vLLM cannot be used: KeyError: 'model'."),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fails(error))
            with pytest.raises(UserError, match=said):
                if name == "__init__":
                    make_trainer(tmp_path, use_vllm=True)
                trainer.sample(*drawn)
    generate = vllm.LLM.generate

    def full(llm, prompts, **given):
        if prompts[0]["prompt_token_ids"] == [4, 5]:  # past the check
            raise torch.OutOfMemoryError("full")
        return generate(llm, prompts, **given)

    monkeypatch.setattr(vllm.LLM, "generate", full)
    with pytest.raises(torch.OutOfMemoryError):  # the trainer says what to lower
        trainer.sample(*drawn)


class Server(http.server.BaseHTTPRequestHandler):
    """`vllm serve` with its development endpoints, over the fake engine."""

    protocol_version, engine, posts, updates = "HTTP/1.1", None, [], []
    weight_transfer = {"backend": "nccl"}

    def log_message(self, *_):
        pass

    def reply(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        path = self.path.split("?")[0]
        self.reply({
            "/health": {}, "/v1/models": {"data": [{"id": "tiny"}]}, "/get_world_size":
            {"world_size": 1}, "/server_info": {"vllm_config": {
                "weight_transfer_config": self.weight_transfer
            }},
        }[path])

    def do_POST(self):
        given = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or b"{}")
        self.posts.append(self.path)
        if self.path == "/update_weights":
            self.updates.append(given["update_info"])
        if self.path == "/finish_weight_update":
            sent = importlib.import_module("vllm.distributed.weight_transfer.nccl_engine").sent
            info = self.updates[-1]
            assert info["names"] == [name for name, _ in sent]
            assert info["shapes"] == [list(w.shape) for _, w in sent]
            assert set(info["dtype_names"]) == {"float32"}
            self.engine.load_weights(sent)
            sent.clear()
        if self.path == "/v1/completions":
            choices = []
            for prompt in given["prompt"]:
                ids, log_probs = self.engine.complete(prompt, types.SimpleNamespace(**given))
                tokens = [f"token_id:{i}" for i in ids]
                choices.append({"prompt_token_ids": prompt, "token_ids": ids, "logprobs": {
                    "tokens": tokens, "token_logprobs": log_probs, "top_logprobs": [{}] * len(ids),
                }})
            return self.reply({"choices": choices})
        return self.reply({})


@pytest.fixture
def server(vllm, monkeypatch):
    monkeypatch.setattr(Server, "posts", [])
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    made.daemon_threads = True
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()
    made.server_close()
    thread.join()


def test_a_server_samples_with_the_weights_of_every_step(server, vllm, tmp_path, monkeypatch):
    import accelerate

    monkeypatch.setattr(accelerate.Accelerator, "device", torch.device("cuda"))  # TRL wants one
    given = options(tmp_path, use_peft=True, lora_r=4)
    monkeypatch.setattr(Server, "engine", vllm.Engine(given["model_name_or_path"]))
    trainer = make_trainer(
        tmp_path, use_peft=True, lora_r=4, use_vllm=True, vllm_mode="server",
        vllm_server_base_url=server,
    )
    records = trainer.train()
    check_run(trainer, Server.engine)
    check = ["/start_weight_update", "/update_weights", "/finish_weight_update",
             "/reset_prefix_cache", "/v1/completions"]
    step = [*check, "/v1/completions"]  # two of training, and check_run's
    assert Server.posts == ["/init_weight_transfer_engine", *2 * check, *3 * step]
    assert records[-1]["sampling/sampling_logp_difference/max"] < 1e-4


def test_a_server_that_cannot_be_used_is_a_sentence(server, vllm, tmp_path, monkeypatch):
    monkeypatch.setattr(Server, "weight_transfer", None)
    with pytest.raises(UserError, match="vLLM cannot be used: .*weight-transfer engine"):
        make_trainer(tmp_path, use_vllm=True, vllm_mode="server", vllm_server_base_url=server)
    with pytest.raises(UserError, match="vLLM cannot be used: The vLLM server can't be reached"):
        make_trainer(
            tmp_path, use_vllm=True, vllm_mode="server", vllm_server_timeout=0,
            vllm_server_base_url="http://127.0.0.1:9",
        )


def test_a_server_with_other_log_probs_is_refused(server, vllm, tmp_path, monkeypatch):
    import accelerate

    monkeypatch.setattr(accelerate.Accelerator, "device", torch.device("cuda"))
    given = options(tmp_path, temperature=0.5)
    engine = vllm.Engine(given["model_name_or_path"])
    monkeypatch.setattr(Server, "engine", engine)
    complete = engine.complete

    def unprocessed(prompt, params):  # as vllm serve does without --logprobs-mode
        ids, _ = complete(prompt, params)
        params.temperature = 1.0
        return ids, naive_log_probs(engine.model, prompt, ids, params).tolist()

    monkeypatch.setattr(engine, "complete", unprocessed)
    asked = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": server}
    with pytest.raises(UserError, match="does not sample from Qwen3.*processed_logprobs, or set"):
        make_trainer(tmp_path, temperature=0.5, **asked)
    make_trainer(tmp_path, **asked)  # at 1 both are the same
