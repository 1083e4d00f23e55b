"""From a line of a file to a sample: readers, records, images, audio, the chat template, the processor."""
