"""All targets, by name."""

import fuzz_chat
import fuzz_files
import fuzz_texts
import fuzz_weights

TARGETS = {
    target.name: target
    for target in (
        *fuzz_chat.TARGETS,
        *fuzz_texts.TARGETS,
        *fuzz_weights.TARGETS,
        *fuzz_files.TARGETS,
    )
}
