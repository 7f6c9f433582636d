"""Work on data: which texts to label next, and which labels are wrong."""
