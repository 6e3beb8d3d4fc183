"""Text, images and videos -> token ids and patches, in numpy."""
