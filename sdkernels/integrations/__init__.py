"""sdkernels inside other people's trainers. Each module imports its host; `import sdkernels` imports none of them."""
