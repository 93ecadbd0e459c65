//! One connection to a dispatcher: challenge, hello, then frames both ways.

use std::{sync::Arc, time::Duration};

use futures::{Sink, SinkExt, Stream, StreamExt};
use infera_protocol::identity::IdentityError;
use infera_runtime::{CancellationToken, clock};
use infera_wire::{MAX_FRAME_BYTES, Message as _, WireError, convert, v1};
use tokio::{
    sync::mpsc,
    time::{Instant, interval, sleep, timeout},
};
use tokio_tungstenite::{
    connect_async_with_config,
    tungstenite::{Error as WsError, Message, protocol::WebSocketConfig},
};

use crate::{Args, journal::Key, slots::Slots};

/// How long the dispatcher may take to connect, to challenge and to welcome.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// How long open slots are waited for at the end.
const DRAIN: Duration = Duration::from_secs(10);
/// Pings missed after which the connection counts as lost.
const MISSED: u32 = 3;

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("cannot connect: {0}")]
    Connect(Box<WsError>),
    #[error("the dispatcher did not answer in {} s", HANDSHAKE.as_secs())]
    Handshake,
    #[error("the dispatcher refused this node ({code}): {reason}")]
    Refused { code: String, reason: String },
    #[error("the dispatcher works for another network: chain {chain_id}, contract {contract}")]
    Network { chain_id: u64, contract: String },
    #[error("unexpected frame: {0}")]
    Frame(#[from] WireError),
    #[error("the operator's key cannot sign the node's binding: {0}")]
    Binding(#[from] IdentityError),
    #[error("the dispatcher was silent for {0} s")]
    Silent(u64),
    #[error("the dispatcher does not read its frames")]
    Behind,
    #[error("the connection is lost")]
    Lost,
}

/// Runs one session until it is lost or `shutdown` has drained it. True if the dispatcher welcomed the node.
pub async fn run(args: &Args, slots: &Arc<Slots>, shutdown: &CancellationToken) -> bool {
    let mut welcomed = false;
    let outcome = session(args, slots, shutdown, &mut welcomed).await;
    slots.disconnected();
    match outcome {
        Ok(()) => {}
        Err(ended @ Ended::Refused { .. }) => tracing::error!(reason = %ended, "session refused"),
        Err(ended) => tracing::warn!(reason = %ended, dispatcher = args.dispatcher, "session ended"),
    }
    welcomed
}

async fn session(
    args: &Args,
    slots: &Arc<Slots>,
    shutdown: &CancellationToken,
    welcomed: &mut bool,
) -> Result<(), Ended> {
    let url = format!("{}/v1/node/session", args.dispatcher.trim_end_matches('/'));
    let limits = WebSocketConfig::default()
        .max_message_size(Some(MAX_FRAME_BYTES))
        .max_frame_size(Some(MAX_FRAME_BYTES));
    let connecting = timeout(HANDSHAKE, connect_async_with_config(&url, Some(limits), true));
    let (socket, _) = tokio::select! {
        connected = connecting => connected.map_err(|_| Ended::Handshake)?.map_err(|e| Ended::Connect(Box::new(e)))?,
        () = shutdown.cancelled() => return Ok(()),
    };
    let (mut sink, mut stream) = socket.split();
    let heartbeat_secs = timeout(HANDSHAKE, handshake(args, slots, &mut sink, &mut stream))
        .await
        .map_err(|_| Ended::Handshake)??;
    *welcomed = true;
    tracing::info!(dispatcher = args.dispatcher, "session is open");
    let (frames, behind) = slots.connected();
    let silence = Duration::from_secs(u64::from(heartbeat_secs.max(1) * MISSED));
    tokio::select! {
        sent = write(&mut sink, frames) => sent,
        ended = read(slots, &mut stream, silence, shutdown) => ended,
        () = drain(slots, shutdown) => Ok(()),
        () = behind.cancelled() => Err(Ended::Behind),
    }
}

async fn handshake<S, R>(args: &Args, slots: &Arc<Slots>, sink: &mut S, stream: &mut R) -> Result<u32, Ended>
where
    S: Sink<Message, Error = WsError> + Unpin,
    R: Stream<Item = Result<Message, WsError>> + Unpin,
{
    use v1::from_dispatcher::Message as Frame;
    let Frame::Challenge(challenge) = next_frame(stream).await? else {
        return Err(WireError::Missing { field: "challenge" }.into());
    };
    let domain = slots.identity.domain;
    if challenge.chain_id != domain.chain_id || challenge.contract != domain.contract.0 {
        let contract = format!("0x{}", hex::encode(&challenge.contract));
        return Err(Ended::Network { chain_id: challenge.chain_id, contract });
    }
    let nonce = <[u8; 32]>::try_from(challenge.nonce.as_slice())
        .map_err(|_| WireError::invalid("challenge.nonce", "expected 32 bytes"))?;
    let hello = slots.identity.hello(
        &nonce,
        slots.setting.weights.root(),
        args.class().name(),
        u32::from(args.slots),
    )?;
    send(sink, v1::from_node::Message::Hello(hello)).await?;
    loop {
        match next_frame(stream).await? {
            Frame::Welcome(welcome) => return Ok(welcome.heartbeat_secs),
            Frame::Refused(v1::Refused { code, reason }) => return Err(Ended::Refused { code, reason }),
            Frame::RangeChallenge(challenge) => {
                if let Some(proof) = slots.proof(challenge).await {
                    send(sink, v1::from_node::Message::RangeProof(proof)).await?;
                }
            }
            _ => return Err(WireError::Missing { field: "welcome" }.into()),
        }
    }
}

async fn send<S>(sink: &mut S, message: v1::from_node::Message) -> Result<(), Ended>
where
    S: Sink<Message, Error = WsError> + Unpin,
{
    let frame = v1::FromNode { message: Some(message) };
    sink.send(Message::binary(frame.encode_to_vec())).await.map_err(|_| Ended::Lost)
}

async fn next_frame<R>(stream: &mut R) -> Result<v1::from_dispatcher::Message, Ended>
where
    R: Stream<Item = Result<Message, WsError>> + Unpin,
{
    loop {
        match stream.next().await {
            Some(Ok(Message::Binary(bytes))) => return decode(&bytes),
            Some(Ok(Message::Close(_)) | Err(_)) | None => return Err(Ended::Lost),
            Some(Ok(_)) => {}
        }
    }
}

fn decode(bytes: &[u8]) -> Result<v1::from_dispatcher::Message, Ended> {
    let frame: v1::FromDispatcher = infera_wire::decode("FromDispatcher", bytes)?;
    frame.message.ok_or_else(|| WireError::Missing { field: "message" }.into())
}

async fn write<S>(sink: &mut S, mut frames: mpsc::Receiver<v1::FromNode>) -> Result<(), Ended>
where
    S: Sink<Message, Error = WsError> + Unpin,
{
    while let Some(frame) = frames.recv().await {
        sink.send(Message::binary(frame.encode_to_vec())).await.map_err(|_| Ended::Lost)?;
    }
    Ok(())
}

async fn read<R>(
    slots: &Arc<Slots>,
    stream: &mut R,
    silence: Duration,
    shutdown: &CancellationToken,
) -> Result<(), Ended>
where
    R: Stream<Item = Result<Message, WsError>> + Unpin,
{
    let mut heard = Instant::now();
    let mut tick = interval(Duration::from_secs(1));
    loop {
        tokio::select! {
            frame = stream.next() => {
                heard = Instant::now();
                match frame {
                    Some(Ok(Message::Binary(bytes))) => act(slots, decode(&bytes)?, shutdown.is_cancelled())?,
                    Some(Ok(Message::Close(_)) | Err(_)) | None => return Err(Ended::Lost),
                    // Pings are answered by the library.
                    Some(Ok(_)) => {}
                }
            }
            _ = tick.tick() => {
                slots.expire(clock::now_ms());
                if heard.elapsed() > silence {
                    return Err(Ended::Silent(heard.elapsed().as_secs()));
                }
            }
        }
    }
}

fn act(slots: &Arc<Slots>, frame: v1::from_dispatcher::Message, draining: bool) -> Result<(), Ended> {
    use v1::from_dispatcher::Message as Frame;
    let key = |field, id: &[u8], attempt| -> Result<Key, Ended> { Ok((convert::uuid(field, id)?, attempt)) };
    match frame {
        Frame::Lease(lease) => slots.lease(&lease, draining),
        Frame::RevealRequest(asked) => {
            let key = key("reveal_request.request_id", &asked.request_id, asked.attempt)?;
            slots.reveal(key, asked.reveal_deadline_ms);
        }
        Frame::Cancel(cancel) => slots.cancel(key("cancel.request_id", &cancel.request_id, cancel.attempt)?),
        Frame::Released(done) => slots.release(key("released.request_id", &done.request_id, done.attempt)?),
        Frame::Refused(v1::Refused { code, reason }) => return Err(Ended::Refused { code, reason }),
        Frame::RefereeLease(lease) => slots.referee(&lease, draining),
        Frame::RangeChallenge(challenge) => slots.prove(challenge),
        Frame::Challenge(_) | Frame::Welcome(_) => {
            return Err(WireError::invalid("message", "not expected here").into());
        }
    }
    Ok(())
}

/// After `shutdown`: says so, and returns once no slot is open or [`DRAIN`] is over.
async fn drain(slots: &Slots, shutdown: &CancellationToken) {
    shutdown.cancelled().await;
    slots.say_draining();
    tracing::info!(open = slots.open(), generating = slots.generating(), "draining");
    let until = Instant::now() + DRAIN;
    while slots.open() > 0 && Instant::now() < until {
        sleep(Duration::from_millis(50)).await;
    }
    // Lets the writer send what is queued.
    while slots.queued() > 0 && Instant::now() < until {
        sleep(Duration::from_millis(10)).await;
    }
}
