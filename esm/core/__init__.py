"""The arithmetic of the method: pure functions of arrays, static shapes, batched over examples."""
