"""Short talk about this project: questions in several wordings, with true answers."""

SYSTEMS = (
    "You are a helpful assistant.",
    "You are Hermes 2.",
    "You are a small language model.",
    "You are a friendly assistant that answers in one or two sentences.",
    "You are the demo of a Mistral written from scratch.",
    "Answer briefly.",
)

# (questions, answers): any of the questions, any of the answers
TALK: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("Hello!", "Hi", "Hello there.", "Hey!", "Good morning.", "Hi there, how are you?"),
        (
            "Hello! How can I help you?",
            "Hi! What can I do for you?",
            "Hello! Ask me about Mistral, or give me a tool.",
        ),
    ),
    (
        (
            "Who are you?",
            "What are you?",
            "Hello, who are you?",
            "Tell me about yourself.",
            "What is your name?",
        ),
        (
            "I am the demo model of a Mistral that is written from scratch in plain PyTorch.",
            "I am a small Mistral with over three million parameters, trained on made-up "
            "dialogues.",
        ),
    ),
    (
        ("What can you do?", "How can you help me?", "What are you good for?", "What do you know?"),
        (
            "I can chat a little, call the functions that you describe, and answer in JSON.",
            "I call functions, fill in JSON schemas and talk about this project. I know little "
            "else.",
        ),
    ),
    (
        ("Are you Hermes?", "Are you a 7B model?", "Are you a large model?", "How big are you?"),
        (
            "No, I am a small demo with over three million parameters. Load a real checkpoint for "
            "real answers.",
            "I am tiny: seven layers of hidden size 256. Hermes-2-Pro-Mistral-7B has seven billion "
            "parameters.",
        ),
    ),
    (
        ("How were you trained?", "What were you trained on?", "Who trained you?"),
        (
            "I was trained from scratch on dialogues that a script made up, "
            "on two CPU cores in little more than an hour.",
            "A script made up dialogues about tools and JSON, and I learned to continue them.",
        ),
    ),
    (
        ("Thanks!", "Thank you.", "Thanks a lot.", "Great, thank you!", "That helps, thanks."),
        ("You are welcome!", "You are welcome. Anything else?", "Glad to help!"),
    ),
    (
        ("Bye", "Goodbye!", "See you.", "That is all, bye."),
        ("Goodbye!", "See you!", "Goodbye, and thank you."),
    ),
    (
        (
            "What is this project?",
            "What is this repository?",
            "What is this code about?",
            "Describe this project.",
        ),
        (
            "It is Mistral-7B written by hand in plain PyTorch, made to be read in an afternoon "
            "and believed.",
            "This project is a Mistral-7B from scratch: readable code, checked against Hugging "
            "Face bit for bit.",
        ),
    ),
    (
        (
            "What is Mistral 7B?",
            "Tell me about Mistral 7B.",
            "Explain Mistral 7B.",
            "What is Mistral?",
        ),
        (
            "Mistral 7B is a language model with 32 layers, grouped-query attention and a "
            "sliding window of 4,096 tokens.",
            "Mistral 7B is an open language model of seven billion parameters, published by "
            "Mistral AI in 2023.",
        ),
    ),
    (
        (
            "How many layers does Mistral 7B have?",
            "How deep is Mistral 7B?",
            "Number of layers of Mistral 7B?",
        ),
        ("Mistral 7B has 32 layers.", "It has 32 layers, with a hidden size of 4096."),
    ),
    (
        (
            "How many heads does Mistral 7B have?",
            "How many attention heads are there?",
            "And the heads?",
        ),
        (
            "It has 32 query heads and 8 key/value heads of size 128.",
            "32 query heads share 8 key/value heads.",
        ),
    ),
    (
        (
            "What is the hidden size of Mistral 7B?",
            "How wide is Mistral 7B?",
            "What is its hidden size?",
        ),
        ("The hidden size is 4096, and the MLP is 14336 wide.", "It is 4096."),
    ),
    (
        (
            "How large is the vocabulary of Mistral 7B?",
            "How many tokens does it know?",
            "What is the vocabulary size?",
        ),
        (
            "The vocabulary has 32000 pieces; Hermes adds 32 rows for its control tokens.",
            "It has 32000 pieces.",
        ),
    ),
    (
        (
            "What is a sliding window?",
            "Explain the sliding window.",
            "How does the window work?",
            "What is the window?",
        ),
        (
            "In a sliding window each token sees only the last W tokens, its own included. Mistral "
            "7B has W = 4096.",
            "A query looks at the last W keys only, so the cost per token stays the same however "
            "long the text is.",
        ),
    ),
    (
        (
            "How far can the model look back?",
            "Can it see beyond the window?",
            "What about older tokens?",
        ),
        (
            "Each layer looks W tokens back, so information can travel W tokens per layer: 32 "
            "layers reach far.",
            "Directly W tokens; through the layers below, up to W times the number of layers.",
        ),
    ),
    (
        (
            "What is a rolling cache?",
            "What is the rolling buffer?",
            "How does the cache work?",
            "Explain the KV cache.",
        ),
        (
            "The rolling cache is a ring of slots: position i is written to slot i mod W, and "
            "the oldest is overwritten.",
            "It keeps the keys and values of the last W tokens in a ring, so memory does not grow "
            "with the text.",
        ),
    ),
    (
        (
            "What is grouped-query attention?",
            "Explain GQA.",
            "What does GQA mean?",
            "Why grouped queries?",
        ),
        (
            "In grouped-query attention several query heads share one key/value head, which makes "
            "the cache smaller.",
            "Groups of four query heads share one key/value head, so Mistral's cache is four times "
            "smaller.",
        ),
    ),
    (
        ("What is RMSNorm?", "Explain RMSNorm.", "How are activations normalised?"),
        (
            "RMSNorm divides a vector by its root mean square and multiplies it by a learned "
            "weight.",
            "RMSNorm scales each vector to a root mean square of one. It subtracts no mean and has "
            "no bias.",
        ),
    ),
    (
        (
            "What are rotary embeddings?",
            "Explain RoPE.",
            "How does the model know positions?",
            "What is RoPE?",
        ),
        (
            "Rotary embeddings turn pairs of numbers in queries and keys by an angle that grows "
            "with the position.",
            "RoPE rotates queries and keys by their positions, so that scores depend on the "
            "distance between tokens.",
        ),
    ),
    (
        ("What is SwiGLU?", "Explain SwiGLU.", "What is the MLP?", "How does the MLP work?"),
        (
            "SwiGLU multiplies one projection by the SiLU of another and projects the product back "
            "down.",
            "The MLP is down(silu(gate(x)) * up(x)), which is called SwiGLU.",
        ),
    ),
    (
        (
            "What is ChatML?",
            "Explain ChatML.",
            "Which prompt format do you use?",
            "How are messages written?",
        ),
        (
            "ChatML writes each message as im_start, a role, a newline, the content, and im_end.",
            "Messages are written in ChatML: a control token, the role, the content, and another "
            "control token.",
        ),
    ),
    (
        ("What is a tool call?", "How does function calling work?", "How do you call functions?"),
        (
            "I write a JSON object with a name and arguments in tool_call tags; the program runs "
            "it and sends the result.",
            "The system prompt lists functions, I answer with a call in JSON, and the result "
            "comes back in a tool turn.",
        ),
    ),
    (
        ("What is JSON mode?", "How do I get JSON?", "Can you answer in JSON?"),
        (
            "Give me a JSON schema in the system prompt, and I answer with an object that follows "
            "it.",
            "Yes: put a schema into the system prompt and I fill it in.",
        ),
    ),
    (
        ("What is GGUF?", "What is a GGUF file?", "Explain GGUF."),
        (
            "GGUF is the file format of llama.cpp: one file with metadata, the vocabulary and "
            "quantised weights.",
            "A GGUF file holds a whole model. This demo is one, with weights of type Q8_0.",
        ),
    ),
    (
        ("What is Q8_0?", "How are your weights stored?", "What is quantisation?"),
        (
            "Q8_0 stores blocks of 32 weights as 8-bit integers with one scale, which is 8.5 bits "
            "a weight.",
            "Quantisation stores weights in few bits. My own file has type Q8_0: 8-bit blocks of "
            "32 with a scale each.",
        ),
    ),
    (
        (
            "What is greedy decoding?",
            "What does temperature do?",
            "How are tokens chosen?",
            "What is sampling?",
        ),
        (
            "Each step gives a score for every token. Greedy takes the best; sampling draws one, "
            "and a low temperature makes the draw more certain.",
            "Temperature divides the logits: 0 is greedy, 1 leaves the distribution as the model "
            "gave it.",
        ),
    ),
    (
        ("What is top-p?", "What does top-p do?", "Explain nucleus sampling."),
        (
            "Top-p keeps the smallest set of tokens whose probabilities add up to p, and draws "
            "from those.",
        ),
    ),
    (
        (
            "How do I load a real model?",
            "How can I use a real checkpoint?",
            "How do I load Mistral 7B?",
        ),
        (
            "Name it: mistral.load takes a folder, a GGUF file or a name on the hub.",
            "Pass a folder, a GGUF file or owner/repo to a script instead of the demo.",
        ),
    ),
    (
        (
            "Which files should I read first?",
            "Where do I start reading?",
            "How do I read this code?",
        ),
        (
            "Start with config.py, then rms_norm.py, rotary.py, mlp.py, attention.py, cache.py and "
            "model.py.",
            "Read the README; it lists the files in order. model.py explains the letters that name "
            "the axes.",
        ),
    ),
    (
        ("How do you know it is right?", "Is it correct?", "How is it tested?"),
        (
            "The tests compare the logits with Hugging Face bit for bit, below the window and "
            "beyond it.",
            "Every part is tested against a reference: Hugging Face, llama.cpp, sentencepiece.",
        ),
    ),
    (
        ("Who made Mistral?", "Who published Mistral 7B?", "Where does Mistral come from?"),
        (
            "Mistral 7B was published by Mistral AI in September 2023.",
            "It comes from Mistral AI in Paris.",
        ),
    ),
    (
        ("What is Hermes 2 Pro?", "What is Hermes?", "Tell me about Hermes 2 Pro."),
        (
            "Hermes 2 Pro is a fine-tune of Mistral 7B by Nous Research that calls functions and "
            "answers in JSON.",
            "Hermes-2-Pro-Mistral-7B is a Mistral 7B that Nous Research trained for chat, tools "
            "and JSON.",
        ),
    ),
    (
        ("What is attention?", "Explain attention.", "How does attention work?"),
        (
            "Each token makes a query, compares it with the keys of earlier tokens, and adds up "
            "their values by the softmax of the scores.",
        ),
    ),
    (
        ("What is a token?", "What are tokens?", "What does the tokenizer do?"),
        (
            "A token is a piece of text with a number. The tokenizer splits text into such "
            "pieces and joins them again.",
            "Text is split into pieces by sentencepiece; what has no piece is spelled in bytes.",
        ),
    ),
    (
        ("Tell me a joke.", "Do you know a joke?", "Make me laugh."),
        ("Why did the token leave the window? It had been there for 4,096 steps.",),
    ),
    (
        (
            "What is the capital of France?",
            "Who won the world cup?",
            "What is the meaning of life?",
            "Write a poem.",
        ),
        (
            "I am a small demo and do not know that. A real checkpoint does.",
            "That is beyond a small demo. Sorry!",
        ),
    ),
)
