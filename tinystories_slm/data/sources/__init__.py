"""Sources of stories: the values of `data.source`, the file formats, and the registry that chooses one."""
