"""The checkpoints of ``tests.checkpoints`` in Transformers' own classes, float32 and eager.

LLaVA and InternVL come in their authors' layouts, which SGLang serves and Transformers does not read: their
weights are renamed here, and a picture is prepared as SGLang prepares it, which needs no resizing of a
square one whose side is the tiles'.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BatchFeature,
    CLIPImageProcessor,
    InternVLConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    SiglipImageProcessor,
)

from tests.checkpoints import FAMILIES, NORMALISE, checkpoint
from tests.hf_reference import Reference


def reference(name: str) -> Reference:
    classes = {"qwen3-vl": Reference, "internvl3": InternVL}
    return classes[name](checkpoint(name)) if name in classes else Llava(name)


def write_transformers_layout(reference: Llava, directory: Path) -> None:
    """LLaVA 1.6 as Transformers stores it, for SGLang to serve with Transformers' code."""
    reference.model.save_pretrained(directory)
    edges = {"height": reference.size, "width": reference.size}
    images = LlavaNextImageProcessor(
        size={"shortest_edge": reference.size}, crop_size=edges,
        image_grid_pinpoints=reference.model.config.image_grid_pinpoints, **NORMALISE,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("llava-1.6"))
    LlavaNextProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(directory)  # fmt: skip


class Renamed(Reference):
    """A checkpoint whose weights and prompts Transformers would not know.

    Args:
        config: of Transformers' class.
        weights: by Transformers' names.
    """

    def __init__(self, name: str, config, weights: dict[str, torch.Tensor]) -> None:
        self.family = FAMILIES[name]
        self.tokenizer = Tokenizer.from_file(str(checkpoint(name) / "tokenizer.json"))
        model = AutoModelForImageTextToText.from_config(
            config, dtype=torch.float32, attn_implementation="eager"
        )
        model.load_state_dict({name: weight.float() for name, weight in weights.items()})
        self.use(model)

    def inputs(self, prompt) -> BatchFeature:
        [image] = prompt.images
        pixels, options = self.pixels(image)
        before, after = prompt.body()["text"].split(self.family.image)
        num_tokens = self.num_tokens(pixels)
        ids = [
            *self.tokenizer.encode(before + self.family.opens).ids,
            *[self.model.config.image_token_id] * num_tokens,
            *self.tokenizer.encode(self.family.closes + after).ids,
        ]
        ids = torch.tensor([ids])
        return BatchFeature(
            {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, **options}
        )


class Llava(Renamed):
    """LLaVA 1.5, 1.6 or OneVision."""

    def __init__(self, name: str) -> None:
        path = checkpoint(name)
        config = json.loads((path / "config.json").read_text())
        tower = path / ("siglip" if name == "llava-onevision" else "clip")
        vision = AutoConfig.from_pretrained(tower)
        text_type, wrapper = {
            "llava-1.5": ("llama", LlavaConfig),
            "llava-1.6": ("mistral", LlavaNextConfig),
            "llava-onevision": ("qwen2", LlavaOnevisionConfig),
        }[name]
        self.size = vision.image_size
        self.is_tiled = name != "llava-1.5"
        self.image_processor = (
            SiglipImageProcessor if name == "llava-onevision" else CLIPImageProcessor
        ).from_pretrained(path)
        pinpoints = {"image_grid_pinpoints": config["image_grid_pinpoints"]} if self.is_tiled else {}
        wrapped = wrapper(
            vision_config=vision.to_dict(),
            text_config={**config, "model_type": text_type, "architectures": None},
            image_token_index=config["image_token_index"],
            vision_feature_layer=config["mm_vision_select_layer"],
            vision_feature_select_strategy="full" if name == "llava-onevision" else "default",
            **pinpoints,
        )
        weights = {
            f"model.vision_tower.{name}": weight
            for name, weight in load_file(tower / "model.safetensors").items()
        }
        for name_there, weight in load_file(path / "model.safetensors").items():
            here = name_there.replace("model.mm_projector.0", "model.multi_modal_projector.linear_1")
            here = here.replace("model.mm_projector.2", "model.multi_modal_projector.linear_2")
            weights[re.sub(r"^model\.(?=layers|embed_tokens|norm)", "model.language_model.", here)] = weight
        super().__init__(name, wrapped, weights)

    def pixels(self, image: Image.Image) -> tuple[torch.Tensor, dict]:
        """The whole picture and, where it is tiled, its tiles; float16 as SGLang sends it."""
        tiles = [image.resize((self.size, self.size))]
        if self.is_tiled:
            for top in range(0, image.height, self.size):
                for left in range(0, image.width, self.size):
                    tiles.append(image.crop((left, top, left + self.size, top + self.size)))
        pixels = self.image_processor(tiles, return_tensors="pt").pixel_values.half().float()
        if not self.is_tiled:
            return pixels, {}
        return pixels[None], {"image_sizes": torch.tensor([[image.height, image.width]])}

    def num_tokens(self, pixels: torch.Tensor) -> int:
        """A token per patch, and one at the end of every line of a tiled picture."""
        side = self.size // 14
        if not self.is_tiled:
            return side * side
        tiles = round((pixels.shape[1] - 1) ** 0.5)
        return side * side + side * tiles * (side * tiles + 1)


class InternVL(Renamed):
    """InternVL3."""

    def __init__(self, path) -> None:
        config = json.loads((path / "config.json").read_text())
        vision = config["vision_config"]
        wrapped = InternVLConfig(
            vision_config={
                "attention_bias": True,
                "use_mean_pooling": True,
                **{key: vision[key] for key in (
                    "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers",
                    "image_size", "patch_size", "norm_type", "hidden_act",
                )},
            },
            text_config={**config["llm_config"], "architectures": None},
            image_token_id=FAMILIES["internvl3"].id_of("<IMG_CONTEXT>"),
            tie_word_embeddings=False,
        )  # fmt: skip
        names = {
            "language_model.lm_head": "lm_head",
            "language_model.model": "model.language_model",
            "vision_model": "model.vision_tower",
            "class_embedding": "cls_token",
            "patch_embedding": "patch_embeddings.projection",
            "position_embedding": "position_embeddings",
            "encoder.layers": "encoder.layer",
            "mlp1.0": "model.multi_modal_projector.layer_norm",
            "mlp1.1": "model.multi_modal_projector.linear_1",
            "mlp1.3": "model.multi_modal_projector.linear_2",
            "attn.proj": "attention.projection_layer",
            "norm1": "layernorm_before",
            "norm2": "layernorm_after",
            "ls1": "lambda_1",
            "ls2": "lambda_2",
        }
        weights = {}
        for name, weight in load_file(path / "model.safetensors").items():
            for there, here in names.items():
                name = name.replace(there, here)
            if "attn.qkv" in name:
                for part, piece in zip("qkv", weight.chunk(3)):
                    weights[name.replace("attn.qkv", f"attention.{part}_proj")] = piece
            else:
                weights[name] = weight
        super().__init__("internvl3", wrapped, weights)

    def pixels(self, image: Image.Image) -> tuple[torch.Tensor, dict]:
        from sglang.srt.multimodal.processors.internvl import InternVLProcessor
        from torchvision.transforms.functional import pil_to_tensor

        mean, std = InternVLProcessor._get_normalize_tensors(device="cpu")
        tensor = (pil_to_tensor(image).float() / 255 - mean) / std
        return InternVLProcessor.dynamic_preprocess(tensor, use_thumbnail=True).float(), {}

    def num_tokens(self, pixels: torch.Tensor) -> int:
        return len(pixels) * 8 * 8
