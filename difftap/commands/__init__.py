"""One file a command: each parses its options, makes one library call and prints."""
