"""Cross-entropy over a vocabulary without its logits."""
