//! A wallet: a key, and the messages that it signs.

use infera_protocol::bytes::Address;
use infera_protocol::identity::evm_address;
use infera_protocol::siwe::{self, Message};
use k256::ecdsa::SigningKey;
use serde_json::{Value, json};

use crate::support::{World, json_of};

pub struct Wallet(SigningKey);

impl Wallet {
    pub fn new() -> Self {
        let bytes: [u8; 32] = rand::random();
        Self(SigningKey::from_slice(&bytes).unwrap())
    }

    pub fn address(&self) -> Address {
        evm_address(&self.0)
    }

    /// The account's name.
    pub fn account(&self) -> String {
        self.address().to_string()
    }

    pub fn sign(&self, text: &str) -> String {
        siwe::sign(text, &self.0).unwrap().to_string()
    }

    /// The message that the gateway proposes, as a wallet shows it.
    pub async fn message(&self, world: &World) -> Message {
        let body = json!({ "address": self.account() });
        let nonce = json_of(world.post_to("/v1/auth/nonce", None, &body).await).await;
        Message::parse(nonce["message"].as_str().unwrap()).unwrap()
    }

    /// The body of a sign-in with `message`.
    pub fn login(&self, message: &Message) -> Value {
        let text = message.to_string();
        json!({ "message": text, "signature": self.sign(&text) })
    }

    /// Signs in.
    pub async fn sign_in(&self, world: &World) -> SignedIn {
        let message = self.message(world).await;
        let response = world.post_to("/v1/auth/login", None, &self.login(&message)).await;
        assert_eq!(response.status(), 200);
        let body = json_of(response).await;
        let text = |name: &str| body[name].as_str().unwrap().to_owned();
        SignedIn { key: text("api_key"), jti: text("jti") }
    }
}

/// What a sign-in brought.
pub struct SignedIn {
    pub key: String,
    pub jti: String,
}
