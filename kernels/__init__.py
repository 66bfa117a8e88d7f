"""Our own operators, one a file: `import fxaccel.kernels.rms_norm` registers `fxaccel::rms_norm`.

Every operator file holds, top to bottom: what it computes, `reference` (the meaning, in plain torch),
`unsupported` (why the kernel cannot take given arguments), the kernels, and the registration. Files that
start with an underscore are helpers. The operators work without triton, on the CPU.
"""
