"""Files that the package carries: the weights of the small ViT, and how they were made."""
