//! What a peer shows to be let in: `authorization: Bearer TOKEN` beside each call.

use std::fmt;

use tonic::metadata::{AsciiMetadataValue, MetadataMap};

/// The header that a token travels in.
const HEADER: &str = "authorization";
/// What stands before it there.
const SCHEME: &str = "Bearer ";
/// Fewer characters could be guessed from their hash.
const CHARS_MIN: usize = 16;
/// More is no token.
const CHARS_MAX: usize = 512;

/// A token as its owner shows it. It appears in no log and no error: `Debug` hides it, and there is no `Display`.
#[derive(Clone)]
pub struct Token(String);

/// Why a text is no token. Says nothing of the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadToken {
    /// It has too few or too many characters.
    #[error("a token has 16 to 512 characters, not {chars}")]
    Length {
        /// How many it has.
        chars: usize,
    },
    /// It has a character that no token has.
    #[error("a token has letters, digits and signs without spaces, all of them ASCII")]
    Character,
    /// The header holds something else.
    #[error("the header `authorization` must read `Bearer TOKEN`")]
    Scheme,
}

impl Token {
    /// The token that `text` is, if it is one.
    ///
    /// # Errors
    /// [`BadToken`] if it is none.
    pub fn new(text: &str) -> Result<Token, BadToken> {
        let chars = text.chars().count();
        if !(CHARS_MIN..=CHARS_MAX).contains(&chars) {
            return Err(BadToken::Length { chars });
        }
        if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(BadToken::Character);
        }
        Ok(Token(text.to_owned()))
    }

    /// The token made of these random bytes. Its beginning says what it is to whoever finds one where it should not be.
    pub fn from_random(bytes: [u8; 32]) -> Token {
        let digits = bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]);
        let digits = digits.map(|digit| char::from_digit(u32::from(digit), 16).unwrap_or('0'));
        Token(std::iter::once("reknit-token-".to_owned()).chain(digits.map(String::from)).collect())
    }

    /// The text itself: to send it, to hash it, to give it to its owner.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// Puts it into the headers of a call, marked as one that neither side may remember or print.
    pub fn attach(&self, headers: &mut MetadataMap) {
        // Tokens are ASCII, so there always is such a value.
        if let Ok(mut value) = AsciiMetadataValue::try_from(format!("{SCHEME}{}", self.0)) {
            value.set_sensitive(true);
            headers.insert(HEADER, value);
        }
    }

    /// The one in the headers of a call, if there is one.
    ///
    /// # Errors
    /// [`BadToken`] if what is there is none.
    pub fn shown(headers: &MetadataMap) -> Result<Option<Token>, BadToken> {
        let Some(value) = headers.get(HEADER) else { return Ok(None) };
        let text = value.to_str().map_err(|_| BadToken::Character)?;
        let (scheme, token) = text.split_at_checked(SCHEME.len()).ok_or(BadToken::Scheme)?;
        if !scheme.eq_ignore_ascii_case(SCHEME) {
            return Err(BadToken::Scheme);
        }
        Token::new(token.trim()).map(Some)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p1_a_token_in_a_header_is_the_same_token_and_never_shown() {
        let token = Token::from_random([0xA5; 32]);
        assert_eq!(token.reveal(), format!("reknit-token-{}", "a5".repeat(32)));
        let mut headers = MetadataMap::new();
        assert!(matches!(Token::shown(&headers), Ok(None)));
        token.attach(&mut headers);
        assert_eq!(Token::shown(&headers).unwrap().unwrap().reveal(), token.reveal());
        for shown in [format!("{token:?}"), format!("{headers:?}")] {
            assert!(!shown.contains("a5a5"), "{shown}");
        }
    }

    #[test]
    fn p2_what_is_no_token_says_why_without_saying_what_it_was() {
        assert_eq!(Token::new("short").err(), Some(BadToken::Length { chars: 5 }));
        assert_eq!(Token::new(&"x".repeat(513)).err(), Some(BadToken::Length { chars: 513 }));
        assert_eq!(Token::new("with a space and more").err(), Some(BadToken::Character));
        let mut headers = MetadataMap::new();
        for other in ["Basic dXNlcjpwYXNzd29yZA==", "", "Bearer"] {
            headers.insert("authorization", other.parse().unwrap());
            assert_eq!(Token::shown(&headers).err(), Some(BadToken::Scheme), "{other:?}");
        }
    }
}
