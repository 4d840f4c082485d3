"""Vision-language packing (Qwen2.5-VL): documents with images in one row; each image stays with its document.

python examples/vision.py
"""

from __future__ import annotations

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import axattn

IMAGE, START, END = 90, 92, 93


def small_model() -> Qwen2_5_VLForConditionalGeneration:
    """A tiny Qwen2.5-VL with random weights."""
    torch.manual_seed(0)
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "in_channels": 3}
    vision |= {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16}
    text = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    config = Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": rope},
        vision_config={**vision, "out_hidden_size": 32, "fullatt_block_indexes": [1], "tokens_per_second": 2},
        image_token_id=IMAGE,
        video_token_id=91,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


@torch.no_grad()
def main() -> float:
    """The largest difference between packed documents and the same documents alone."""
    model = axattn.apply(small_model(), "auto")
    grid = torch.tensor([[1, 4, 4]])  # an image of 4 x 4 patches: 2 x 2 tokens
    images = [torch.randn(16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    documents = [[3, 4, START, *[IMAGE] * 4, END, 5, 6 + i] for i in range(2)]
    row = [token for document in documents for token in document]
    batch = {
        "input_ids": torch.tensor([row]),
        "position_ids": torch.tensor([[*range(len(documents[0])), *range(len(documents[1]))]]),
        "mm_token_type_ids": torch.tensor([[int(token == IMAGE) for token in row]]),
        "pixel_values": torch.cat(images),
        "image_grid_thw": grid.repeat(2, 1),
    }
    packed = model(**batch, use_cache=False).logits[0]
    alone = [
        model(
            input_ids=torch.tensor([document]),
            mm_token_type_ids=torch.tensor([[int(token == IMAGE) for token in document]]),
            pixel_values=image,
            image_grid_thw=grid,
            use_cache=False,
        ).logits[0]
        for document, image in zip(documents, images, strict=True)
    ]
    worst = float((packed - torch.cat(alone)).abs().max())
    print(f"2 documents with an image each, packed against alone, largest difference of logits: {worst:.4f}")
    assert worst < 1e-4
    return worst


if __name__ == "__main__":
    main()
