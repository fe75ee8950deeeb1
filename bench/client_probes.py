"""What a client makes of an exported folder, in the client's own environment: python client_probes.py CLIENT FOLDER

FOLDER has model/, and in said.json and log_probabilities.npy what our model says (bench/clients.py). The last line of
the output is a JSON object: versions, and for each use of the client how near it comes. Nothing of nanostack is imported.
"""

import importlib.metadata
import json
import sys
import tempfile
import urllib.request
from pathlib import Path

import numpy as np

FOLDER = Path(sys.argv[2])
MODEL = str(FOLDER / "model")
SAID = json.loads((FOLDER / "said.json").read_text())
OURS = np.load(FOLDER / "log_probabilities.npy")  # (tokens of "ids", vocabulary)


def near(logits) -> dict:
    """The largest difference of log-probabilities, of logits (tokens, vocabulary)."""
    logits = np.asarray(logits, np.float64)
    theirs = (
        logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logits.max(-1, keepdims=True)
    )
    return {"log_probabilities": float(abs(theirs - OURS).max())}


def counted(what: str, found: list, wanted: list) -> dict:
    return {what: f"{sum(a == b for a, b in zip(found, wanted, strict=True))} of {len(wanted)}"}


def loaded():
    import torch
    import transformers

    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL)
    return model, transformers.AutoTokenizer.from_pretrained(MODEL), torch.tensor([SAID["ids"]])


def of_transformers() -> dict:
    import torch
    import transformers

    model, tokenizer, ids = loaded()
    with torch.no_grad():
        plain = near(model(ids).logits[0])
    how = {"max_new_tokens": SAID["tokens"], "do_sample": False, "suppress_tokens": [SAID["eot"]]}
    greedy = []
    for prompt in SAID["prompts"]:
        inputs = tokenizer(prompt, return_tensors="pt")
        greedy.append(model.generate(**inputs, **how)[0, inputs["input_ids"].shape[1] :].tolist())
    found = plain | counted("greedy", greedy, SAID["greedy"])
    found |= counted("ids", [tokenizer(text)["input_ids"] for text in SAID["texts"]], SAID["text_ids"])
    pipe = transformers.pipeline("text-generation", model=MODEL, device="cpu")
    texts = [pipe(prompt, **how)[0]["generated_text"] for prompt in SAID["prompts"]]
    wanted = [prompt + tokenizer.decode(ids) for prompt, ids in zip(SAID["prompts"], SAID["greedy"], strict=True)]
    return {"model": found, "pipeline": counted("texts", texts, wanted), "Trainer": trained(model, tokenizer)}


def trained(model, tokenizer) -> dict:
    """Twenty steps on one padded batch: the first loss is ours, the last is lower."""
    import transformers

    tokenizer.pad_token = tokenizer.eos_token
    collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    rows = [{"input_ids": SAID["ids"]}, {"input_ids": SAID["ids"][:50]}]
    with tempfile.TemporaryDirectory() as out:
        options = {"per_device_train_batch_size": 2, "max_steps": 20, "learning_rate": 1e-3, "logging_steps": 1}
        options |= {
            "report_to": "none",
            "use_cpu": True,
            "save_strategy": "no",
            "disable_tqdm": True,
            "lr_scheduler_type": "constant",
        }
        args = transformers.TrainingArguments(output_dir=out, **options)
        trainer = transformers.Trainer(model=model, args=args, train_dataset=rows, data_collator=collate)
        trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    return {"loss": abs(losses[0] - SAID["padded_loss"]), "fell": [losses[0], losses[-1]]}


def of_peft() -> dict:
    import peft
    import torch

    model, _, ids = loaded()
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    tuned = peft.get_peft_model(model, config)
    with torch.no_grad():
        before = near(tuned(ids).logits[0])
    optimizer = torch.optim.AdamW([one for one in tuned.parameters() if one.requires_grad], 1e-2)
    for _ in range(5):
        loss = tuned(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        apart = tuned(ids).logits
        merged = tuned.merge_and_unload()(ids).logits
    return {"before training": before, "merged": {"logits": float((apart - merged).abs().max())}}


def of_onnx() -> dict:
    import onnxruntime
    import torch

    model, _, ids = loaded()

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids):
            return self.model(input_ids=input_ids, use_cache=False).logits

    with tempfile.TemporaryDirectory() as out:
        path = str(Path(out) / "model.onnx")
        torch.onnx.export(Logits(), (ids,), path, dynamo=True, input_names=["input_ids"], output_names=["logits"])
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return {"onnxruntime": near(session.run(None, {"input_ids": ids.numpy()})[0][0])}


def of_litgpt() -> dict:
    import shutil

    import torch
    from litgpt import GPT, Config, Tokenizer

    with tempfile.TemporaryDirectory() as out:
        folder = Path(out) / "model"
        shutil.copytree(MODEL, folder)
        found = json.loads((folder / "config.json").read_text())
        shape = {
            "name": "ours",
            "hf_config": {},
            "block_size": found["max_position_embeddings"],
            "vocab_size": found["vocab_size"],
        }
        shape |= {
            "padded_vocab_size": found["vocab_size"],
            "n_layer": found["num_hidden_layers"],
            "n_head": found["num_attention_heads"],
        }
        shape |= {"n_embd": found["hidden_size"], "n_query_groups": found["num_key_value_heads"], "rotary_percentage": 1.0}
        shape |= {"parallel_residual": False, "bias": False, "norm_class_name": "RMSNorm", "norm_eps": found["rms_norm_eps"]}
        shape |= {"mlp_class_name": "LLaMAMLP", "intermediate_size": found["intermediate_size"]}
        from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
        from safetensors.torch import load_file

        config = Config(**shape)
        weights: dict = {}
        copy_weights_hf_llama(config, {}, weights, load_file(folder / "model.safetensors"))
        model = GPT(config)
        model.load_state_dict(weights)
        tokenizer = Tokenizer(folder)
        ids = [tokenizer.encode(text, bos=False, eos=False).tolist() for text in SAID["texts"] if text]
        with torch.no_grad():
            logits = model(torch.tensor([SAID["ids"]]))[0]
    return {
        "GPT": near(logits)
        | counted("ids", ids, [one for one, text in zip(SAID["text_ids"], SAID["texts"], strict=True) if text])
    }


def of_ctranslate2() -> dict:
    import ctranslate2
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    with tempfile.TemporaryDirectory() as out:
        ctranslate2.converters.TransformersConverter(MODEL).convert(f"{out}/model")
        generator = ctranslate2.Generator(f"{out}/model", device="cpu", intra_threads=1)
        names = tokenizer.convert_ids_to_tokens(SAID["ids"])
        logits = np.array(generator.forward_batch([names]))[0]
        prompts = [tokenizer.convert_ids_to_tokens(tokenizer(prompt)["input_ids"]) for prompt in SAID["prompts"]]
        how = {"max_length": SAID["tokens"], "sampling_topk": 1, "include_prompt_in_result": False}
        how |= {"suppress_sequences": [[tokenizer.eos_token]]}
        greedy = [generator.generate_batch([prompt], **how)[0].sequences_ids[0] for prompt in prompts]
    return {"Generator": near(logits) | counted("greedy", greedy, SAID["greedy"])}


def of_llama_cpp() -> dict:
    import xllamacpp

    wanted = xllamacpp.CommonParams()
    wanted.model.path, wanted.n_ctx, wanted.n_parallel = f"{MODEL}/model.gguf", 256, 1
    wanted.cpuparams.n_threads = wanted.cpuparams_batch.n_threads = 1
    wanted.verbosity, wanted.warmup, wanted.fit_params = -1, False, False
    wanted.cache_type_k = wanted.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    wanted.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # which rounds to 16 bits
    server = xllamacpp.Server(wanted)

    def ask(what: str, **body) -> dict:
        request = urllib.request.Request(f"{server.listening_address}/{what}", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    how = {"temperature": 0, "top_k": 1, "cache_prompt": False, "ignore_eos": True, "return_tokens": True}
    greedy = [ask("completion", prompt=prompt, n_predict=SAID["tokens"], **how)["tokens"] for prompt in SAID["prompts"]]
    ids = [ask("tokenize", content=text, add_special=True, parse_special=False)["tokens"] for text in SAID["texts"]]
    # Of the last token. An A is made to come, since half a character would not be told.
    how |= {"n_probs": OURS.shape[1], "logit_bias": [[65, 1000.0]]}
    (told,) = ask("completion", prompt=SAID["ids"], n_predict=1, **how)["completion_probabilities"]
    theirs = {one["id"]: one["logprob"] for one in told["top_logprobs"]}
    found = {"log_probabilities": max(abs(theirs[i] - OURS[-1, i]) for i in range(OURS.shape[1]))}
    return {"server": found | counted("greedy", greedy, SAID["greedy"]) | counted("ids", ids, SAID["text_ids"])}


PROBES = {
    "transformers 5": of_transformers,
    "transformers 4.45": of_transformers,
    "peft": of_peft,
    "onnx": of_onnx,
    "litgpt": of_litgpt,
    "ctranslate2": of_ctranslate2,
    "llama.cpp": of_llama_cpp,
}
VERSIONS = ["torch", "transformers", "peft", "onnx", "onnxruntime", "litgpt", "ctranslate2", "xllamacpp", "tokenizers"]

if __name__ == "__main__":
    found = PROBES[sys.argv[1]]()
    installed = {one.name for one in importlib.metadata.distributions()}
    versions = {name: importlib.metadata.version(name) for name in VERSIONS if name in installed}
    print(json.dumps({"versions": versions} | found))
