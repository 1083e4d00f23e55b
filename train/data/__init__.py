"""From a line of a file to a sample: readers, records, pictures, audio, the chat template, the processor."""
