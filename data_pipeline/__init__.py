"""Images to beton files, and beton files to multi-crop batches, at the speed of the decoder."""
