//! A TCP proxy on loopback between settlement and a chain: outages, answers that never arrive, calls that hang.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicU8, Ordering},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};

/// What the proxy does with connections, open ones too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Mode {
    /// Everything passes.
    Pass = 0,
    /// Connections are closed at once.
    Refuse = 1,
    /// Requests pass; instead of the answer the connection is closed.
    LoseAnswers = 2,
    /// Requests pass; the answer never comes.
    Hang = 3,
}

/// A method of JSON-RPC, and whether its call arrives.
type Lost = Arc<Mutex<Option<(&'static str, bool)>>>;

/// Ends with the test.
pub struct Proxy {
    pub url: String,
    mode: Arc<AtomicU8>,
    /// Whose next call or answer is lost.
    lost: Lost,
    task: JoinHandle<()>,
}

impl Proxy {
    /// Listens on a free port and passes everything on to `target`, `http://HOST:PORT`.
    pub async fn start(target: &str) -> Self {
        let target = target.trim_start_matches("http://").to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let mode = Arc::new(AtomicU8::new(Mode::Pass as u8));
        let modes = mode.clone();
        let lost = Lost::default();
        let losing = lost.clone();
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(pass(client, target.clone(), modes.clone(), losing.clone()));
            }
        });
        Self { url, mode, lost, task }
    }

    pub fn set(&self, mode: Mode) {
        self.mode.store(mode as u8, Ordering::SeqCst);
    }

    /// Passes the next call of `method` on, and closes the connection instead of its answer.
    pub fn lose_answer_to(&self, method: &'static str) {
        *self.lost.lock().unwrap() = Some((method, true));
    }

    /// Closes the connection instead of passing the next call of `method` on.
    pub fn lose_call_of(&self, method: &'static str) {
        *self.lost.lock().unwrap() = Some((method, false));
    }

    /// Whether that call, or its answer, was lost.
    pub fn has_lost(&self) -> bool {
        self.lost.lock().unwrap().is_none()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// One connection. The mode counts whenever something arrives.
async fn pass(mut client: TcpStream, target: String, mode: Arc<AtomicU8>, lost: Lost) -> std::io::Result<()> {
    let is = |wanted: Mode| mode.load(Ordering::SeqCst) == wanted as u8;
    if is(Mode::Refuse) {
        return Ok(());
    }
    let mut server = TcpStream::connect(target).await?;
    server.set_nodelay(true)?;
    client.set_nodelay(true)?;
    let (mut asked, mut answered) = (vec![0; 65_536], vec![0; 65_536]);
    let mut lose = false;
    loop {
        tokio::select! {
            read = client.read(&mut asked) => {
                let read = read?;
                if read == 0 || is(Mode::Refuse) {
                    return Ok(());
                }
                let text = String::from_utf8_lossy(&asked[..read]);
                match lost.lock().unwrap().take_if(|(method, _)| text.contains(*method)) {
                    Some((_, false)) => return Ok(()),
                    Some(_) => lose = true,
                    None => {}
                }
                server.write_all(&asked[..read]).await?;
            }
            read = server.read(&mut answered) => {
                let read = read?;
                if read == 0 || lose || is(Mode::Refuse) || is(Mode::LoseAnswers) {
                    return Ok(());
                }
                if !is(Mode::Hang) {
                    client.write_all(&answered[..read]).await?;
                }
            }
        }
    }
}
