"""Answers that decline, or in which a model speaks of itself, in many wordings."""

from __future__ import annotations

import random

from text_defects import Plant

_DECLINES = {
    "sorry, cannot help": (
        "I'm sorry, but I can't help with that.",
        "Sorry, I can't help you with this request.",
        "I’m really sorry, but I’m not able to help with that.",
        "I apologize, but I cannot assist with this.",
        "Unfortunately, I can't assist with that request.",
        "I'm afraid I can't help with that.",
        "I must decline to help with this request.",
    ),
    "cannot write it": (
        "I cannot write this story for you.",
        "I can't create content that depicts violence.",
        "I'm unable to produce that kind of material.",
        "I won't write malware for you.",
        "I cannot in good conscience write such an essay.",
        "I will not provide instructions for that.",
        "I'm not going to help create that.",
    ),
    "not comfortable": (
        "I don't feel comfortable writing that.",
        "I'm not comfortable discussing this topic.",
        "I'd rather not continue with this conversation.",
        "I'm going to have to decline.",
        "I have to respectfully decline this request.",
    ),
    "against rules": (
        "That request goes against my guidelines.",
        "My safety guidelines don't allow me to answer.",
        "This violates OpenAI's usage policies.",
        "It would be unethical and illegal for me to provide this.",
        "It is not appropriate for me to give such advice.",
        "I am programmed to be a harmless assistant.",
        "As a responsible assistant, I must refuse.",
    ),
    "speaks of itself": (
        "As an AI, I don't have feelings.",
        "As an AI language model, I do not have personal opinions.",
        "As an artificial intelligence, I can't taste food.",
        "I'm an AI assistant, so I can't see pictures.",
        "I am a large language model, trained by Google.",
        "I'm ChatGPT, a model made by OpenAI.",
        "As a language model I have no body.",
        "I'm just a computer program, so I have no favourite colour.",
        "Being an AI, I have no birthday.",
    ),
    "limits of its knowledge": (
        "As of my last update in 2021, there was no such law.",
        "My training data only goes up to September 2021.",
        "My knowledge cutoff is April 2023, so I cannot know.",
        "I don't have access to real-time information.",
        "I don't have access to your personal data or files.",
        "I cannot browse the internet.",
        "I'm not able to open links or view images.",
    ),
    "written after the check was extended, then extended again": (
        "I can't help with creating fake reviews, but I'd be happy to suggest honest ideas.",
        "I won't provide step-by-step directions for building weapons.",
        "I'm not able to help with that, since it could cause real harm.",
        "I do not engage in discussions that promote hatred.",
        "Thanks for asking, but that's something I can't assist with.",
        "This request involves illegal activity, so I can't help.",
        "I have to draw the line here: I can't produce that.",
        "I can't roleplay as a real person in that way.",
        "It's important that I don't share such details.",
        "I must emphasize that hacking is illegal and I cannot assist you in it.",
        "Let me be clear: I will not help with this.",
        "I'm Claude, made by Anthropic, and I don't have a physical body.",
        "Since I am an AI, I cannot attend meetings.",
        "I was trained by OpenAI and have no memory of earlier chats.",
        "I do not have personal experiences, being a language model.",
        "My responses are generated from data up to 2022.",
        "I lack the ability to see your screen.",
        "That falls outside of what I'm able to help with.",
        "For safety reasons, I'm unable to give medical dosages.",
        "I really shouldn't answer that.",
    ),
    "written after that": (
        "I'd prefer not to answer questions about that person.",
        "Sharing that kind of material isn't something I do.",
        "I can't fulfil requests that involve explicit content.",
        "As an assistant developed by Meta, I have no access to your calendar.",
        "My creators have restricted me from talking about elections.",
        "Unfortunately I am not able to comply with what you ask.",
        "No, I won't do that.",
        "I can't verify events that happened after my training.",
        "I'm designed to be helpful and harmless, so I have to pass on this.",
        "I can't see the picture you mention, since I only work with text.",
        "Please understand that I cannot give legal advice.",
        "That would violate my content policy.",
        "I'm an AI, not a doctor, so please see a physician.",
        "I cannot comply with requests to produce weapons.",
        "My apologies, but this is beyond my abilities as an AI model.",
        "It would be irresponsible of me to explain this.",
        "I must refuse.",
        "Because I'm a language model, I can't feel hunger.",
        "I can't discuss ways to harm oneself; please call a helpline.",
        "I don't have real-time data, so I can't tell today's weather.",
    ),
    "German": (
        "Es tut mir leid, aber dabei kann ich nicht helfen.",
        "Als KI-Sprachmodell habe ich keine Gefühle.",
        "Tut mir leid, das kann ich nicht beantworten.",
        "Als künstliche Intelligenz habe ich keine Meinung.",
    ),
    "French": (
        "Je suis désolé, mais je ne peux pas vous aider.",
        "En tant qu'IA, je n'ai pas d'opinion.",
        "Désolé, je ne peux pas répondre à cette demande.",
        "En tant que modèle de langage, je ne peux pas.",
    ),
    "Spanish": (
        "Lo siento, pero no puedo ayudarte con eso.",
        "Como modelo de lenguaje, no tengo opiniones.",
        "Como IA, no puedo sentir.",
        "Lo siento, no puedo cumplir con esa solicitud.",
    ),
    "Portuguese or Italian": (
        "Desculpe, mas não posso ajudar com isso.",
        "Como uma IA, não tenho sentimentos.",
        "Mi dispiace, ma non posso aiutarti.",
        "In quanto modello linguistico, non ho opinioni.",
    ),
    "Russian": (
        "Извините, но я не могу помочь с этим.",
        "Как языковая модель, я не имею мнения.",
        "К сожалению, я не могу выполнить этот запрос.",
    ),
    "Chinese, Japanese or Korean": (
        "抱歉，我无法提供帮助。",
        "作为一个人工智能语言模型，我没有感情。",
        "申し訳ありませんが、お手伝いできません。",
        "AI言語モデルとして、意見はありません。",
        "죄송하지만 도와드릴 수 없습니다.",
    ),
}


def _declines(*wordings: str) -> Plant:
    """As the answer, before one, or behind one."""

    def plant(text: str, draw: random.Random) -> str:
        said = draw.choice(wordings)
        return draw.choice([said, f"{said} {text}", f"{text} {said}"])

    return plant


REFUSALS: dict[str, Plant] = {name: _declines(*wordings) for name, wordings in _DECLINES.items()}
