"""One file a paper: a vision tower, a memory and a decoder behind one interface, begin -> watch* -> answer."""
