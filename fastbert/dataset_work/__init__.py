"""Work on labelled data: which labels are wrong, which texts to label next."""
