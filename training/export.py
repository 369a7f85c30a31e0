"""
A run's weights for others: the tensor names of the paper's released checkpoints, no optimizer, and a model card.

    python -m training.export --run runs/xl2_512_unmasked --out microdit.safetensors
    python -m training.export --run runs/tiny --out tiny.pt --dtype float32 --scores scores/results.json

A .safetensors file also holds the configuration: MicroDiT.from_official(load_file(FILE), config) reads it back.
"""
from configurator import configure

run = ""                    # run folder or checkpoint; empty: the newest run
out = ""                    # FILE.safetensors, or FILE.pt as the paper's; FILE.md beside it is the model card
dtype = "bfloat16"          # of the tensors: bfloat16 or float32
ema = True                  # the averaged weights, where the run has them
scores = ""                 # results.json of eval_fid.py, for the model card

if __name__ == "__main__":
    settings = configure(globals())

import json
from pathlib import Path

import torch
from safetensors.torch import save

from common.files import read_jsonl, write_atomic
from training import checkpoint


def export(path, file, dtype, ema=True):
    """Write the weights of a checkpoint to a file and return what the checkpoint says of itself."""
    net, run = checkpoint.load_network(path, ema)
    tensors = {name: t.to(dtype).contiguous() for name, t in net.to_official().items()}
    if file.suffix == ".safetensors":
        data = save(tensors, {"config": json.dumps(run["config"])})
        write_atomic(file, lambda opened: opened.write(data))
    else:
        write_atomic(file, lambda opened: torch.save(tensors, opened))
    return run


def model_card(path, file, run, results):
    """Return the text of the model card: where the weights come from, how they were trained, how good they are."""
    losses = [e for e in read_jsonl(Path(path).parent / "log.jsonl") if "val_loss" in e and e["step"] <= run["step"]]
    lines = [f"# {file.stem}", "", f"A MicroDiT network, step {run['step']:,} of {Path(path).parent.name}, under the "
             "tensor names of the paper's released checkpoints. It was trained on latents and captions of:", "",
             f"- autoencoder: {run['data']['vae']['name']}, scaling factor {run['data']['vae']['scaling_factor']}",
             f"- text encoder: {run['data']['text_encoder']['name']}", f"- {run['data'].get('rows', '?'):,} pictures"]
    if losses:
        lines.append(f"- validation loss at step {losses[-1]['step']:,}: {losses[-1]['val_loss']:.4f}")
    for result in results:
        numbers = {k: v for k, v in result.items() if isinstance(v, float)}
        numbers |= {name: f"{right} of {of}" for name, (right, of, *_) in result.get("attributes", {}).items()}
        lines.append(f"- {result['folder']}: " + ", ".join(f"{name} {value}" for name, value in numbers.items()))
    for title, values in (("Network", run["config"]), ("Training", run["settings"])):
        lines += ["", f"## {title}", "", *(f"- {name}: {value}" for name, value in values.items())]
    return "\n".join(lines) + "\n"


def main():
    file = Path(out)
    if file.suffix not in (".safetensors", ".pt") or dtype not in ("bfloat16", "float32"):
        raise ValueError(f"out is '{out}', dtype '{dtype}': they must be FILE.safetensors or FILE.pt, and bfloat16 or "
                         "float32")
    results = json.loads(Path(scores).read_text(encoding="utf-8"))["results"] if scores else []
    path = checkpoint.find(run)
    card = model_card(path, file, export(path, file, getattr(torch, dtype), ema), results)
    file.with_suffix(".md").write_text(card, encoding="utf-8")
    print(f"{path} -> {file} ({file.stat().st_size / 1e6:,.1f} MB) and {file.with_suffix('.md')}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"training.export: {error}") from None
