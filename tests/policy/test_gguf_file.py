"""A .gguf file is a model with tokenizer and chat template; what is saved of it is plain."""

import importlib.util
import json
import sys

import pytest
import torch
import transformers
from runs import make_trainer, one_sentence, options, parameters, quick  # noqa: F401

from rlsd import UserError
from rlsd.cli import main
from rlsd.policy import checkpoint

needs_gguf = pytest.mark.skipif(
    importlib.util.find_spec("gguf") is None, reason="needs the package gguf"
)
CHAT = ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}")


def tiny_llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tokens()), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        tie_word_embeddings=True, initializer_range=0.3, rms_norm_eps=1e-5,
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )).eval()


def tokens():
    """Control tokens, then the letters of byte-level BPE."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return ["<unk>", "<|im_start|>", "<|im_end|>", *bytes_to_unicode().values(), "ab"]


def interleaved(weight, heads):
    """llama.cpp's order of the rows of q and k: the halves of every head, one by one."""
    rows, width = weight.shape
    return weight.view(heads, 2, rows // heads // 2, width).transpose(1, 2).reshape(rows, width)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """(path, the model that was written into it)"""
    import gguf

    model, path = tiny_llama(), tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    c, writer = model.config, gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens())
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 257)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers)
    for name, p in model.named_parameters():
        weight = p.detach()
        if "q_proj" in name:
            weight = interleaved(weight, c.num_attention_heads)
        if "k_proj" in name:
            weight = interleaved(weight, c.num_key_value_heads)
        writer.add_tensor(
            names.get_name(name, try_suffixes=(".weight",)), weight.contiguous().numpy()
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path), model


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(40)[None]).logits


@needs_gguf
def test_it_loads_as_the_model_it_was_and_is_saved_plain(file, tmp_path):
    path, model = file
    got, tokenizer = checkpoint.load_model(path, "cpu"), checkpoint.load_tokenizer(path)
    torch.testing.assert_close(logits(got), logits(model), rtol=1e-5, atol=1e-5)
    assert checkpoint.load_processor(path) is None
    assert tokenizer.chat_template == CHAT
    assert tokenizer.decode(tokenizer("7+8")["input_ids"]) == "7+8"
    got.save_pretrained(tmp_path)
    assert "quantiz" not in (tmp_path / "config.json").read_text()
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(plain), logits(got), rtol=0, atol=0)


def run_options(file, folder, **changed):
    rows = [{"prompt": [{"role": "user", "content": f"{i} + 1"}], "solution": f"{i + 1}"}
            for i in range(12)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        **options(folder), "model_name_or_path": file, "lora_r": 2, "max_steps": 2,
        "privileged_template": "{privileged_context} {prompt}", "save_steps": 1, **changed,
    }


@needs_gguf
@pytest.mark.parametrize("use_peft", [False, True], ids=["full", "lora"])
def test_checkpoints_load_and_resume_without_the_file(use_peft, file, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, **run_options(file[0], tmp_path, use_peft=use_peft))
    trainer.train()
    want = parameters(trainer.model)
    run = tmp_path / "run"
    assert (run / "base").exists() is use_peft
    monkeypatch.setitem(sys.modules, "gguf", None)  # importing it fails
    monkeypatch.setattr("rlsd.policy.gguf_file.missing", lambda modules: modules)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(run / "checkpoint-2")
    torch.testing.assert_close(logits(loaded), logits(trainer.model), rtol=1e-6, atol=1e-6)
    again = make_trainer(
        tmp_path, resume_from=run / "checkpoint-1",
        **run_options(file[0], tmp_path, use_peft=use_peft),
    )
    again.train()
    got = parameters(again.model)
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


@needs_gguf
def test_eval_takes_the_file(file, tmp_path, capsys):
    given = run_options(file[0], tmp_path)
    arguments = ["--train_dataset", given["train_dataset"], "--eval_size", "4", "--device", "cpu",
                 "--max_completion_length", "4", "--reward_funcs", "exact_match"]
    assert main(["eval", file[0], *arguments]) == 0
    assert "on 4 held-out questions" in capsys.readouterr().out


@pytest.mark.parametrize("load", [checkpoint.load_model, checkpoint.load_tokenizer])
def test_what_is_missing_is_one_sentence(load, tmp_path, monkeypatch):
    arguments = ["cpu"] * (load is checkpoint.load_model)
    path = tmp_path / "x.gguf"
    with pytest.raises(UserError, match="There is no file .*x.gguf") as error:
        load(str(path), *arguments)
    one_sentence(f"rlsd: {error.value}")
    path.write_bytes(b"GGUF, but damaged")
    monkeypatch.setattr("rlsd.policy.gguf_file.missing", lambda modules: modules)
    with pytest.raises(UserError, match=r"needs the package gguf: pip install 'rlsd\[gguf\]'"):
        load(str(path), *arguments)


@needs_gguf
@pytest.mark.parametrize("load", [checkpoint.load_model, checkpoint.load_tokenizer])
def test_a_damaged_file_is_one_sentence(load, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF, but damaged")
    with pytest.raises(UserError, match="Cannot load the model") as error:
        load(str(path), *["cpu"] * (load is checkpoint.load_model))
    one_sentence(f"rlsd: {error.value}")
