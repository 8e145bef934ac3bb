"""Pure array functions: no Flax, no mesh."""
