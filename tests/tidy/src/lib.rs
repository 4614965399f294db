//! Checks on the code itself, as tests: layers, dead files, undocumented variables, rules that no test names.
//! See `tests/`.
