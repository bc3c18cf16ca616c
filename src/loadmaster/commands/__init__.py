"""The commands, a module each: `add` says what one is asked with, and what runs it. Loaded when used."""
