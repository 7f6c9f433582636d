"""Cross-entropy over a vocabulary without all logits in memory."""
