"""Reading, checking, decoding and caching images."""
