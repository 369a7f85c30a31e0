"""
text.py: token ids against open_clip's (data/clip_tokens.json, which tests/make_clip_tokens.py of commit 95c56be made),
embeddings against transformers' models.
"""
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import encoders
from evaluation.clip import Clip

DATA = json.loads((Path(__file__).parent / "data/clip_tokens.json").read_text())
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
         "vocab_size": 49408, "projection_dim": 16, "hidden_act": "quick_gelu", "bos_token_id": 49406,
         "eos_token_id": 49407}


def write_model(model, folder, spread):
    """Save a model in the published format, away from its initialisation, with the tokenizer"""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(spread * torch.randn(p.shape))
    model.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(DATA["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(DATA["merges"]) + "\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    return model


def write_clip(folder, **changes):
    """A small random CLIP text model"""
    torch.manual_seed(0)
    return write_model(CLIPTextModel(CLIPTextConfig(**TOWER | changes)), folder, 0.3)


def write_clip_model(folder, seed=0, spread=0.1, **changes):
    """A small random CLIP with both towers, image processor and tokenizer"""
    torch.manual_seed(seed)
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 8, "hidden_act": "quick_gelu"} | changes
    model = CLIPModel(CLIPConfig(text_config=TOWER, vision_config=vision, projection_dim=16)).eval()
    side = vision["image_size"]
    crop = {"height": side, "width": side}
    CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=crop).save_pretrained(folder)
    return write_model(model, folder, spread)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    write_clip(folder)
    return folder


def test_token_ids_equal_open_clips(clip):
    assert len(DATA["captions"]) >= 200
    rows = encoders.load_text_encoder(str(clip)).tokens(DATA["captions"])["input_ids"]
    for caption, ids, row in zip(DATA["captions"], DATA["ids"], rows.tolist()):
        assert row == ids + [0] * (77 - len(ids)), caption


def test_embeddings_are_the_last_layers_without_any_mask_but_the_causal_one(clip, tmp_path):
    both, captions = write_clip_model(tmp_path), DATA["captions"][:20]
    for folder, tower in ((clip, CLIPTextModel.from_pretrained(clip)), (tmp_path, both.text_model)):
        encode = encoders.load_text_encoder(str(folder))
        with torch.no_grad():
            expected = tower(encode.tokens(captions)["input_ids"]).last_hidden_state
        assert expected.shape == (20, 77, 32) == (20, encode.length, encode.dim)
        torch.testing.assert_close(encode(captions), expected, atol=2e-5, rtol=1e-4)


def write_word_tokenizer(folder, **special):
    """A tokenizer of a few words, which ends a caption with </s>"""
    words = ["<pad>", "</s>", "<unk>", "a", "photo", "of", "cat", "dog"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    special = {"eos_token": "</s>", "unk_token": "<unk>"} | special
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def test_t5_masks_the_padding_and_keeps_120_tokens(tmp_path):
    write_word_tokenizer(tmp_path, pad_token="<pad>")
    model = T5EncoderModel(T5Config(vocab_size=8, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)).eval()
    model.save_pretrained(tmp_path)
    encode = encoders.load_text_encoder(str(tmp_path))
    out = encode(["a photo of a cat", "A dog"])
    assert out.shape == (2, 120, 16) == (2, encode.length, encode.dim)
    with torch.no_grad():
        expected = model(torch.tensor([[3, 4, 5, 3, 6, 1]])).last_hidden_state
    torch.testing.assert_close(out[:1, :6], expected, atol=1e-5, rtol=1e-4)
    assert encode.tokens(["A dog"])["input_ids"][0, :3].tolist() == [2, 7, 1]  # T5 is given captions as they are


SHAPE = {"vocab_size": 8, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512}
FLAN = {"vocab_size": 8, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
FAMILIES = {  # those that write text on, as they are published, and an encoder beside the decoder that it came with
    "Qwen3": lambda t: t.Qwen3ForCausalLM(t.Qwen3Config(**SHAPE)),
    "Gemma2": lambda t: t.Gemma2ForCausalLM(t.Gemma2Config(**SHAPE, query_pre_attn_scalar=8, sliding_window=4)),
    "Llama": lambda t: t.LlamaForCausalLM(t.LlamaConfig(**SHAPE)),
    "Flan-T5": lambda t: t.T5ForConditionalGeneration(t.T5Config(**FLAN, feed_forward_proj="gated-gelu"))}


@pytest.mark.parametrize("family", FAMILIES)
def test_long_captions_through_other_models(tmp_path, family):
    torch.manual_seed(0)
    whole = FAMILIES[family](transformers).eval()
    whole.save_pretrained(tmp_path)
    write_word_tokenizer(tmp_path)  # it names no padding
    encode = encoders.load_text_encoder(str(tmp_path), length=200)
    captions = ["a photo of a cat " * 30, "A dog", "a cat " * 150]
    out = encode(captions)
    assert out.shape == (3, 200, 32) == (3, encode.length, encode.dim) and encode.longer(captions) == 1
    inner = whole.encoder if family == "Flan-T5" else whole.model
    for row, caption, tokens in zip(out, captions, (151, 3, 200)):
        ids = encode.tokenizer(caption, truncation=True, max_length=200)["input_ids"]
        with torch.no_grad():
            expected = inner(torch.tensor([ids])).last_hidden_state[0]
        assert len(ids) == tokens
        torch.testing.assert_close(row[:tokens], expected, atol=1e-5, rtol=1e-4)
        assert family == "Flan-T5" or not row[tokens:].any()
    assert encode([""]).isfinite().all()
    assert encoders.load_text_encoder(str(tmp_path)).length == (120 if family == "Flan-T5" else 256)
    if family != "Flan-T5":
        with pytest.raises(ValueError, match="it reads 512 tokens, and caption_length is 513"):
            encoders.load_text_encoder(str(tmp_path), length=513)


WEIGHTS = "model.safetensors"
TOKENS = ["tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"]
NOT_WHOLE = {  # (files that are gone, tensors that are others, the message)
    "no tokenizer": (TOKENS[:3], {}, "has no tokenizer: its files .* are missing"),
    "no tokenizer at all": (TOKENS, {}, "has no tokenizer"),
    "no merges": (["tokenizer.json", "merges.txt"], {}, "cannot be used"),
    "a layer short": ([], {"encoder.layers.1.mlp.fc1.bias": None}, "1 missing weights of .*fc1.bias"),
    "a layer more": ([], {"encoder.layers.2.mlp.fc1.bias": torch.zeros(64)}, "1 unexpected weights"),
    "another width": ([], {"encoder.layers.1.mlp.fc1.bias": torch.zeros(8)}, "1 mismatched weights of .*fc1.bias")}


@pytest.mark.parametrize("name", NOT_WHOLE)
@pytest.mark.parametrize("kind", ["text encoder", "CLIP of a score"])
def test_what_is_not_whole_is_refused(clip, tmp_path, name, kind):
    gone, changes, message = NOT_WHOLE[name]
    folder = tmp_path / "cut"
    if kind == "text encoder":
        shutil.copytree(clip, folder)
    else:
        write_clip_model(folder)
    for file in gone:
        (folder / file).unlink()
    tensors, prefix = load_file(folder / "model.safetensors"), "" if kind == "text encoder" else "text_model."
    tensors |= {prefix + key: t for key, t in changes.items()}
    save_file({key: t for key, t in tensors.items() if t is not None}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        encoders.load_text_encoder(str(folder)) if kind == "text encoder" else Clip(str(folder))


def test_the_encoder_of_a_pipeline(clip, tmp_path, monkeypatch):
    """text_encoder/ beside tokenizer/, on the disk and on the hub, and relative to the scripts"""
    captions, expected = DATA["captions"][:3], encoders.load_text_encoder(str(clip))
    for tail, root in (("", "pipe"), ("_2", "other"), ("", "hub/models--org--name/snapshots/0")):
        shutil.copytree(clip, tmp_path / root / f"text_encoder{tail}", ignore=lambda *_: TOKENS)
        shutil.copytree(clip, tmp_path / root / f"tokenizer{tail}", ignore=lambda *_: ["config.json", WEIGHTS])
    (tmp_path / "hub/models--org--name/refs").mkdir()
    (tmp_path / "hub/models--org--name/refs/main").write_text("0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("encoders.hub.ROOT", tmp_path)
    for name in (tmp_path / "pipe", tmp_path / "pipe/text_encoder", tmp_path / "other/text_encoder_2", "pipe",
                 "org/name/text_encoder"):
        loaded = encoders.load_text_encoder(str(name))
        assert torch.equal(loaded(captions), expected(captions)) and loaded.about == expected.about, name
    (tmp_path / "oc").mkdir()
    (tmp_path / "oc/open_clip_config.json").write_text("{}")
    for name in (tmp_path / "oc", clip / "model.safetensors"):
        with pytest.raises(ValueError, match="in open_clip's format: give a folder of transformers"):
            encoders.load_text_encoder(str(name))


def test_captions_that_are_cut_are_counted(clip, capsys):
    captions = ["a dog " * 37 + "a", "a dog " * 37 + "a b", "a cat"]  # 75 tokens and two at the ends
    encoder, words = encoders.load_text_encoder(str(clip)), encoders.load_text_encoder("words")
    assert encoder.longer(captions) == 1 and words.longer(captions) == 2 and encoder.longer([]) == 0
    encoders.warn_of_cut(0, encoder)
    assert not capsys.readouterr().err
    encoders.warn_of_cut(1200, encoder)
    assert "1,200 of the captions are longer than the 77 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("name, config, message", [
    ("no/such-model", {}, "couldn't connect.*--text_encoder FOLDER"), ("{folder}", {}, "model_type"),
    ("{folder}", {"model_type": "bert"}, "has no tokenizer"), ("word", {}, "encoder word cannot be used")])
def test_what_cannot_be_loaded_says_why(tmp_path, name, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        encoders.load_text_encoder(name.format(folder=tmp_path))


def test_gelu_is_refused_for_weights_of_quick_gelu_alone(tmp_path):
    write_clip(tmp_path / "some-clip", hidden_act="gelu")
    assert encoders.load_text_encoder(str(tmp_path / "some-clip")).dim == 32
    with pytest.raises(ValueError, match="hidden_act gelu"):
        encoders.load_text_encoder(str((tmp_path / "some-clip").rename(tmp_path / "DFN5B-CLIP")))
