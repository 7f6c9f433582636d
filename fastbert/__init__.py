"""fastbert: pretraining BERT-class encoders at a fraction of the usual cost."""

__version__ = "0.1.0"
