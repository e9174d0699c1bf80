"""The library of training: ideal curves, instruments, and measurements of the one with the other."""
