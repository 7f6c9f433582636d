"""Active learning as a study with known labels: quality over labels and over cost."""
