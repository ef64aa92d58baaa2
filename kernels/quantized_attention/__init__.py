"""Attention whose two products multiply integers, with the softmax between them."""
