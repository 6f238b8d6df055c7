"""What `softshard blend` prints."""

from __future__ import annotations

from softshard.data.blend_summary import BlendSummary

__all__ = ["render_blend"]


def render_blend(blending: BlendSummary) -> str:
    """For a terminal."""
    lines = []
    for one in blending.sets:
        lines += [
            f"{one.uri}: {one.kind}, {one.num_sequences:,} sequences, {one.num_tokens:,} tokens",
            f"  share {one.share:.1%}; in a mix each sequence is seen {one.times_seen:.2f} times an epoch",
            f"  entropy {one.mean_entropy_nats:.3f} nats, label log-probability {one.mean_label_logprob_nats:.3f} nats",
        ]
    if blending.can_mix:
        lines.append(f"mix: {blending.num_tokens:,} tokens an epoch")
    for style, tokens in blending.tokens_by_style.items():
        lines.append(f"  {style}: {tokens:,} tokens, {tokens / blending.num_tokens:.1%}")
    if blending.blend_entropy_nats is not None:
        blended = (
            f"{blending.num_common:,} sequences in all sets; entropy at least {blending.blend_entropy_nats:.3f} nats"
        )
        lines.append(f"blend: {blended}")
        if blending.needs is not None:
            lines.append(f"  needs {blending.needs}")
    elif not blending.can_mix:
        lines.append("neither mix nor blend: their targets have different temperatures")
    else:
        lines.append(f"blend: not possible, {blending.num_common:,} sequences are in all sets")
        lines += [f"  {one.uri} lacks {one.num_missing:,}" for one in blending.sets if one.num_missing]
    return "\n".join(lines) + "\n"
