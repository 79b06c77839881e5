"""What every package uses and none owns: files, keys, ports, texts, tokens and the device."""
