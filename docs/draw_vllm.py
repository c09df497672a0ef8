"""Draws docs/vllm.svg: where the plug-in sits in a step of vLLM. Run it from anywhere: python docs/draw_vllm.py"""

from pathlib import Path

WIDTH, HEIGHT, ROW, LEFT, RIGHT, BOX = 860, 560, 62, 40, 470, 350
STEPS = [
    ("Scheduler", "which requests, how many tokens", "TidarScheduler", "reserves slots for the requests that draft"),
    ("KV blocks, slot mapping", "places for the keys of all slots", "", ""),
    ("prepare_attn", "attention metadata", "TidarModelState", "drafts, masks, outcome blocks; enter and exit"),
    ("prepare_inputs", "ids and positions", "layout.py", "positions of masks"),
    ("model", "compiled layers, CUDA graphs", "twin of the layers", "gated LoRA and mask embedding"),
    ("attention", "FlashAttention", "kernels/paged.py", "prefix seen by all, own slots by the layout"),
    ("compute_logits, sampler", "logits processing", "TidarSampler", "sampling.py judges, then the next drafts"),
    ("post_update", "cache length += accepted drafts", "metrics.py", "tokens, acceptance, misses on /metrics"),
]


def box(x: int, y: int, title: str, text: str, fill: str) -> str:
    return (
        f'<rect x="{x}" y="{y}" width="{BOX}" height="{ROW - 18}" rx="6" fill="{fill}" stroke="#555"/>'
        f'<text x="{x + 14}" y="{y + 19}" font-weight="bold">{title}</text>'
        f'<text x="{x + 14}" y="{y + 36}" fill="#333">{text}</text>'
    )


def draw() -> str:
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="30" font-size="16" font-weight="bold">vLLM, one step</text>',
        f'<text x="{RIGHT}" y="30" font-size="16" font-weight="bold">what the plug-in brings</text>',
    ]
    for index, (title, text, ours, what) in enumerate(STEPS):
        y = 46 + index * ROW
        parts.append(box(LEFT, y, title, text, "#eef2f7"))
        if index:
            middle = LEFT + BOX // 2
            parts.append(f'<path d="M{middle} {y - 18}v14m-4 -6l4 6l4 -6" stroke="#555" fill="none"/>')
        if ours:
            parts.append(box(RIGHT, y, ours, what, "#fdf1dc"))
            parts.append(f'<path d="M{RIGHT} {y + 22}h-76m6 -4l-6 4l6 4" stroke="#b07a1c" fill="none"/>')
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    Path(__file__).with_name("vllm.svg").write_text(draw())
