"""text.py: token ids against open_clip's, embeddings against a plain restatement of its text tower."""
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import encoders
from encoders import released, text

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
    rows = encoders.load_text_encoder(str(clip)).ids(DATA["captions"])
    for caption, ids, row in zip(DATA["captions"], DATA["ids"], rows.tolist()):
        assert row == ids + [0] * (77 - len(ids)), caption


def tower(weights, ids, heads):
    """open_clip's text tower: causal, without any other mask, to the final layer norm"""
    w = {n.removeprefix("text_model."): t for n, t in weights.items()}

    def linear(x, name):
        return F.linear(x, w[name + ".weight"], w[name + ".bias"])

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"], 1e-5)

    x = w["embeddings.token_embedding.weight"][ids] + w["embeddings.position_embedding.weight"]
    for at in ("encoder.layers.0.", "encoder.layers.1."):
        h = norm(x, at + "layer_norm1")
        q, k, v = (linear(h, at + f"self_attn.{n}_proj").unflatten(-1, (heads, -1)).transpose(1, 2) for n in "qkv")
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + linear(h, at + "self_attn.out_proj")
        h = linear(norm(x, at + "layer_norm2"), at + "mlp.fc1")
        x = x + linear(h * torch.sigmoid(1.702 * h), at + "mlp.fc2")
    return norm(x, "final_layer_norm")


def test_embeddings_equal_the_tower(clip, tmp_path):
    whole, alone = write_clip_model(tmp_path).text_model, CLIPTextModel.from_pretrained(clip)
    for folder, model, captions in ((clip, alone, DATA["captions"]), (tmp_path, whole, ["a cat"])):
        encode = encoders.load_text_encoder(str(folder))
        out, expected = encode(captions), tower(model.state_dict(), encode.ids(captions), 2)
        assert out.shape == (len(captions), 77, 32) and encode.dim == 32 and encode.length == 77
        torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-4)


def test_the_wrong_activation_is_refused(tmp_path):
    write_clip(tmp_path, hidden_act="gelu")
    assert text.load(tmp_path).dim == 32  # some models were trained so
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"quick_gelu": True}}))
    with pytest.raises(ValueError, match="hidden_act gelu"):
        text.load(tmp_path)
    assert text.needs_quick_gelu(released.TEXT_ENCODER)


def test_t5_masks_the_padding_and_keeps_120_tokens(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", "a", "photo", "of", "cat", "dog"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>",
                            unk_token="<unk>").save_pretrained(tmp_path)
    model = T5EncoderModel(T5Config(vocab_size=8, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)).eval()
    model.save_pretrained(tmp_path)
    encode = encoders.load_text_encoder(str(tmp_path))
    out = encode(["a photo of a cat", "A dog"])
    assert out.shape == (2, 120, 16) and encode.dim == 16 and encode.length == 120
    with torch.no_grad():
        expected = model(torch.tensor([[3, 4, 5, 3, 6, 1]])).last_hidden_state
    torch.testing.assert_close(out[:1, :6], expected, atol=1e-5, rtol=1e-4)
    ids = encode.tokens(["A dog", "\u201ca\u201d &amp; dog"])["input_ids"]  # T5 is given captions as they are
    assert ids[0, :3].tolist() == [2, 7, 1] and ids[1, :5].tolist() == [2, 3, 2, 2, 2]


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    write_clip(tmp_path, vocab_size=1000, bos_token_id=998, eos_token_id=999)
    with pytest.raises(ValueError, match="counts tokens up to 49,407, its model has 1,000"):
        text.load(tmp_path)


@pytest.mark.parametrize("name, config, message", [
    ("no/such-model", {}, "neither a folder here nor"), ("{folder}", {}, "model_type"),
    ("{folder}", {"model_type": "bert"}, "CLIP and T5 are understood"), ("word", {}, "unknown text encoder")])
def test_what_cannot_be_loaded_says_why(tmp_path, name, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        encoders.load_text_encoder(name.format(folder=tmp_path))
